# An image for training on GPUs. NVIDIA's PyTorch image has CUDA, NCCL, torch and Transformer Engine in matching versions.
# This project's tests run without a GPU and do not build this image; check it on your cluster before a long run.
FROM nvcr.io/nvidia/pytorch:25.09-py3

# megatron-core uses NVIDIA apex for the fused weight gradient and the fused optimizer. It is built from source, because the
# package called apex on the package index is unrelated.
RUN git clone --depth 1 https://github.com/NVIDIA/apex /opt/apex \
    && cd /opt/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation -v .

WORKDIR /workspace/megatron_llave
COPY . .
# The torch of the image satisfies the open ranges of setup.py and is kept; the pins of requirements.txt would replace it.
RUN pip install --no-cache-dir --no-build-isolation -e '.[video,test]'
