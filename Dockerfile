# For training on GPUs: NVIDIA's PyTorch image brings CUDA, NCCL, torch and Transformer Engine built for each other.
# Not built by this project's tests, which run without a GPU; check it on your cluster before a long run.
FROM nvcr.io/nvidia/pytorch:25.09-py3

# NVIDIA apex, which megatron-core uses for the fused weight gradient and the fused optimizer. From source: the package
# called apex on the package index is another thing.
RUN git clone --depth 1 https://github.com/NVIDIA/apex /opt/apex \
    && cd /opt/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation -v .

WORKDIR /workspace/megatron_llave
COPY . .
# The image's own torch fits the open ranges of setup.py and stays; the pins of requirements.txt would replace it.
RUN pip install --no-cache-dir --no-build-isolation -e '.[video,test]'
