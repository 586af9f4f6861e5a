# An image for training on GPUs. NVIDIA's PyTorch image has CUDA, NCCL, torch and Transformer Engine in matching versions.
# This project's tests run without a GPU and do not build this image; check it on your cluster before a long run.
#
# The digest names the image for good, for amd64 and arm64; a tag can be moved. `docker pull TAG` prints that of another.
FROM nvcr.io/nvidia/pytorch:25.09-py3@sha256:f3b4a33fd60d5e0358287bb44d57e91eda45e8f1681fef1bfd6c969371417130

# megatron-core uses NVIDIA apex for the fused weight gradient and the fused optimizer. It is built from source, because the
# package called apex on the package index is unrelated. The commit is the last one before the image: 5 September 2025.
RUN git init -q /opt/apex && cd /opt/apex \
    && git fetch -q --depth 1 https://github.com/NVIDIA/apex 214c6b33270a6054933749845c32224fb825463d \
    && git checkout -q FETCH_HEAD \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation -v .

WORKDIR /workspace/megatron_llave
COPY --chown=1000:1000 . .
# The torch of the image satisfies the open ranges of setup.py and is kept; the pins of requirements.txt would replace it.
RUN pip install --no-cache-dir --no-build-isolation -e '.[video,test]' && chown 1000:1000 .
# Not root: a run needs no rights but those on its output directory. 1000 is the user `ubuntu` of the image.
USER 1000:1000
