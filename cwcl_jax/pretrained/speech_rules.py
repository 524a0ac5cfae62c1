"""Names of Whisper files, as transformers (PyTorch or Flax) writes them; the decoder stays out."""

from cwcl_jax.pretrained.readers import Weights
from cwcl_jax.pretrained.rules import Family, Rule
from cwcl_jax.pretrained.text_rules import layer_rules
from cwcl_jax.pretrained.views import flax_names, without_prefix


def _view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "(?:model/)?(?=encoder/|decoder/)")


WHISPER = Family(
    name="Whisper",
    signature=r"((model[./])?encoder[./])?conv1[./](weight|kernel)",
    view=_view,
    rules=[
        Rule(r"(?:encoder/)?(conv[12])/(kernel|bias)", r"encoder/\1/\2"),
        Rule(r"(?:encoder/)?embed_positions/embedding", "encoder/position_embedding", "top_rows"),
        Rule(r"(?:encoder/)?layer_norm/(scale|bias)", r"encoder/norm/\1"),
        *layer_rules(r"(?:encoder/)?layers/(\d+)"),
    ],
    ignore=[r"decoder/.*", r"proj_out/.*", r"projector/.*", r"classifier/.*"],
)
