"""`stamina`, quiet: it logs each retry, and Python prints on stderr what no handler takes. The final error says it all."""

from __future__ import annotations

import logging

import stamina  # noqa: TID253 - this module is imported where it is used

__all__ = ["stamina"]

logging.getLogger("stamina").addHandler(logging.NullHandler())
