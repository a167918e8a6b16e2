"""Networks for the built-in tasks."""

from volumejax.models.mlp import MLP as MLP
from volumejax.models.mlp import mlp_apply as mlp_apply
from volumejax.models.mlp import mlp_params as mlp_params
