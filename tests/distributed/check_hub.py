"""Trains as megatron_llave/train.py does, with the hub and the cache that the environment names.

The fork server has imported huggingface_hub before, which reads the environment when it is imported.
"""

import os
import sys

from huggingface_hub import constants

from megatron_llave.train import main

constants.ENDPOINT, constants.HF_HUB_CACHE = os.environ["HF_ENDPOINT"], os.environ["HF_HUB_CACHE"]
path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + path
main(sys.argv[1:])
