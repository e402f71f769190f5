"""Other formats: GGUF files for llama.cpp, and DeciLM checkpoints."""
