# docker build -t fitune .                                   for a CPU
# docker build -t fitune:cuda --target cuda .                for NVIDIA GPUs
# docker run --rm -it -v "$PWD:/work" fitune demo
# docker run --rm -it --gpus all -v "$PWD:/work" fitune:cuda doctor
#
# torch's own wheels bring NVIDIA's libraries and the host its driver, so no image of CUDA is needed below them. The versions
# are those of constraints.txt. An image is only built where something needs it: the CPU's never takes the CUDA libraries.
FROM python:3.12-slim AS sources
ENV PATH=/opt/fitune/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fitune
WORKDIR /sources
COPY pyproject.toml README.md README.zh-CN.md CHANGELOG.md LICENSE ./
COPY src ./src

FROM sources AS build-cpu
RUN pip install "$(grep '^torch==' src/fitune/constraints.txt)" --index-url https://download.pytorch.org/whl/cpu
RUN pip install . --constraint src/fitune/constraints.txt

FROM sources AS build-cuda
RUN pip install "$(grep '^torch==' src/fitune/constraints.txt)"
RUN pip install . --constraint src/fitune/constraints.txt

FROM python:3.12-slim AS base
RUN useradd --create-home --uid 1000 fitune && mkdir -p /work /home/fitune/.cache && chown fitune /work /home/fitune/.cache
ENV PATH=/opt/fitune/bin:$PATH
WORKDIR /work
ENTRYPOINT ["fitune"]
CMD ["--help"]

# Triton compiles the launchers of its kernels with the C compiler that is there.
FROM base AS cuda
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/fitune /opt/fitune
USER fitune

FROM base AS cpu
COPY --from=build-cpu /opt/fitune /opt/fitune
USER fitune
