# For the CPU:       docker build --tag adapruner .
# For NVIDIA GPUs:   docker build --tag adapruner:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
# Prune:             docker run --rm --volume "$PWD:/work" --volume "$HOME/.cache/huggingface:/cache" adapruner prune MODEL
#                    (with --gpus all for a GPU)
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# The index of PyTorch for the CPU; the package index itself has the builds for CUDA, with its libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Further extras: gguf.
ARG EXTRAS=tasks

RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} "torch>=2.6"
COPY pyproject.toml README.md LICENSE /package/
COPY src /package/src
RUN pip install --no-cache-dir "/package[${EXTRAS}]"

RUN useradd --create-home adapruner && mkdir /cache /work && chown adapruner /cache /work
USER adapruner
ENV HF_HOME=/cache
WORKDIR /work
ENTRYPOINT ["adapruner"]
