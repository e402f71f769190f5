"""GGUF files for llama.cpp: checking that a model can be exported, writing it, and its size."""
