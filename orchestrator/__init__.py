"""What happens, in which order: the llmctl program."""
