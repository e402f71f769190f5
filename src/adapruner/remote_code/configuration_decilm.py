"""The config of a DeciLM (Nemotron-NAS) checkpoint for vLLM, SGLang and TensorRT-LLM.

They run such checkpoints with code of their own, but read `block_configs[i].attention.no_op` from objects, and no
config class of transformers makes objects of that part of a config.json. This file is standalone: the checkpoint has a
copy of it, which `trust_remote_code=True` runs.
"""

from transformers import LlamaConfig


class Block(dict):
    """A dictionary whose values are also attributes."""

    def __getattr__(self, name: str) -> object:
        if name not in self:
            raise AttributeError(name)
        value = self[name]
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """The config of Llama, with sizes for every layer in `block_configs`."""

    def __init__(self, block_configs: list[dict] | tuple = (), **fields: object) -> None:
        super().__init__(**fields)
        self.block_configs = [Block(block) for block in block_configs]
        # Engines read it here, where transformers 5 has only `rope_parameters`.
        self.rope_theta = fields.get("rope_theta", 10_000.0)
