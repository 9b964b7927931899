"""Fine-tune a language model in notebooks, from the decision to the proof."""
__version__ = "0.1.0"
