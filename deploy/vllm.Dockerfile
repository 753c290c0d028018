# vLLM's own image with kvtier's client and connector in it. From the repository's root:
#     docker build -f deploy/vllm.Dockerfile -t vllm-kvtier:0.32.0 .
ARG VLLM=vllm/vllm-openai:v0.32.0
ARG PYTHON=python:3.12-slim

FROM ${PYTHON} AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${VLLM}
USER root
# Without kvtier's dependencies, but for those of the client: the image's own versions stay where they
# are in range, and neither LMDB nor zstd is needed on this side.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps /wheels/kvtier-*.whl \
    && uv pip install --system --no-cache \
        "grpcio>=1.71.2" "numpy>=1.26" "protobuf>=5.29.6,<8" "xxhash>=3.4" \
    && python3 -c "import kvtier.client"

# The image brings the user `vllm` (2000:0). What vLLM caches lies below its home, on a volume or not.
RUN install --directory --owner=2000 --group=0 --mode=0770 /home/vllm /home/vllm/.cache
ENV HOME=/home/vllm USER=vllm
USER 2000:0
ENTRYPOINT ["vllm", "serve"]
