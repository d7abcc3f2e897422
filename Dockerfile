# An image for CPU, CUDA or TPU:
#   docker build -t easyaira --build-arg DEVICE=cuda .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" easyaira sft --config configs/aira-2-124m.yaml
# /work is the current folder and holds the caches. Without --gpus all: a CPU. TPU: --privileged --network host.
FROM python:3.12-slim-bookworm

ARG DEVICE=cpu
WORKDIR /opt/easyaira
COPY setup.py pyproject.toml README.md LICENSE ./
COPY easyaira easyaira
# hadolint ignore=DL3013
RUN case "$DEVICE" in \
      cpu) packages="." ;; \
      cuda|tpu) packages=".[$DEVICE]" ;; \
      *) echo "DEVICE: expected cpu, cuda or tpu, got $DEVICE" >&2; exit 2 ;; \
    esac \
    && pip install --no-cache-dir "$packages"

# HOME is the mounted folder, so that caches last and any user of the host can write them. JAX's CUDA comes
# from pip; the host gives the driver.
RUN useradd --uid 1000 --home-dir /work --create-home aira
ENV HOME=/work \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY configs /work/configs
USER 1000
WORKDIR /work
ENTRYPOINT ["easyaira"]
CMD ["--help"]
