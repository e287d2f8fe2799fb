"""Mamba-2 layers of checkpoints, in both directions; their fields have a prefix where other layers share the config."""

from typing import Any

from models.hub.hf.checkpoint import Ours
from models.hub.hf.fields import Fields
from models.hub.hf.layout import Row, constant, same, shaped
from models.mixers.mamba_ssd import MambaSSD

NAMES = ("num_heads", "head_dim", "state_size", "hidden_act")


def mamba(f: Fields, names: tuple[str, str, str, str] = NAMES, **options: Any) -> MambaSSD.Config:
    """names: of the fields for heads, their width, their memory and the activation."""
    heads, head_dim, state, activation = names
    f.only(activation, "silu")
    f.only("use_bias", False)
    f.ignore("chunk_size", "time_step_rank", "time_step_max", "time_step_floor", "rescale_prenorm_residual")
    f.ignore("residual_in_fp32")
    return MambaSSD.Config(
        heads=f.whole(heads, 128),
        head_dim=f.whole(head_dim, 64),
        state=f.whole(state, 128),
        groups=f.whole("n_groups", 8),
        conv=f.whole("conv_kernel", 4),
        **options,
    )


def mamba_fields(m: Ours, names: tuple[str, str, str, str] = NAMES) -> dict[str, Any]:
    mixer = m.first(MambaSSD)
    c = mixer.config
    sizes = dict(zip(names, (mixer.heads, c.head_dim, c.state, "silu")))
    return sizes | {"n_groups": c.groups, "conv_kernel": c.conv, "use_conv_bias": True}


def mamba_rows(c: MambaSSD.Config, dim: int, bias: bool = True) -> list[Row]:
    """bias: whether their convolution has one."""
    return [
        same("mixer.wi.weight", "mixer.in_proj.weight"),
        shaped("mixer.conv", "mixer.conv1d.weight", -1, 1, c.conv),
        same("mixer.conv_bias", "mixer.conv1d.bias") if bias else constant("mixer.conv_bias", 0.0),
        same("mixer.log_decay", "mixer.A_log"),
        same("mixer.step_bias", "mixer.dt_bias"),
        same("mixer.skip", "mixer.D"),
        same("mixer.norm.weight", "mixer.norm.weight"),
        same("mixer.wo.weight", "mixer.out_proj.weight"),
    ]
