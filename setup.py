"""Build finetune_nb from settings.ini, and put the pipeline notebooks into the wheel."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]
licenses = {"apache2": "Apache-2.0"}
readme = here / "README.md"


class BuildWithPipelines(build_py):
    """Copy nbs/pipelines/*.ipynb beside the modules of the package that is being built.

    A checkout or an editable install reads nbs/pipelines itself, so nothing is copied there.
    """

    def run(self):
        super().run()
        if self.editable_mode: return
        target = Path(self.build_lib) / package / "pipelines"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in (here / "nbs" / "pipelines").glob("[!_.]*.ipynb"): shutil.copy2(notebook, target / notebook.name)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=licenses[settings["license"]],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Framework :: Jupyter",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): settings[key].split() for key in settings if key.endswith("_requirements")},
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["shapes.json", "general.txt", ".agents/skills/finetune-nb/SKILL.md"]},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],  # lets `name` in a notebook link to its page
    },
    cmdclass={"build_py": BuildWithPipelines},
    zip_safe=False,
)
