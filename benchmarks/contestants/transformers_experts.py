"""A plug-in: transformers' own experts as a backend, to be measured in the same trainer as ours."""

from omnilit.kernels import MOE

MOE.register("transformers_grouped_mm", "transformers.integrations.moe:grouped_mm_experts_forward")
