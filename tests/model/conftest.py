"""These models are tiny: one thread is fastest, and never waits for a busy core."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
