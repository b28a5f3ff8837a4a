"""What a rank imports, for a fork server to have imported once (see `tests/ranks.py`)."""

from trb_megatron.distributed import cpu_backend

cpu_backend.install()

import transformers.models.auto.tokenization_auto  # noqa: E402, F401

import trb_megatron.trainer  # noqa: E402, F401
