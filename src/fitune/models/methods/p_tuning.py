"""P-tuning: virtual tokens through a trained encoder (Liu et al. 2021, arXiv:2103.10385).

In: a model. Out: the model as PEFT wraps it, with an MLP or an LSTM. What the encoder gives is all that a finished
adapter needs, and all that PEFT saves; the encoder itself is saved beside, so that training can go on.
"""

from __future__ import annotations

from peft import PromptEncoderConfig, get_peft_model

from fitune.core.config import RunConfig
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM, Peft
from fitune.models.methods.virtual import ENCODER, VirtualTokens, in_float32


class PTuning(VirtualTokens):
    """See the module's text."""

    name = "p-tuning"
    trains = "virtual tokens through an encoder (MLP or LSTM)"
    options = "p_tuning"
    default_lr = 1e-3
    why_lr = "an encoder learns at the rates of small networks (Liu et al. 2021 search 5e-5 to 1e-3)"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        options = config.p_tuning
        wrapped: Peft = get_peft_model(
            model,
            PromptEncoderConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=options.tokens,
                encoder_reparameterization_type=options.encoder.upper(),
                encoder_hidden_size=options.width or _width(model),
            ),
        )
        return in_float32(wrapped)

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """The vectors; of the MLP three layers, of the LSTM two bidirectional ones and two layers behind."""
        options, outer = config.p_tuning, _width(model)
        inner = options.width or outer
        found = {"embedding.weight": options.tokens * outer}
        if options.encoder == "lstm":
            for layer, inputs in ((0, outer), (1, 2 * inner)):
                for direction in ("", "_reverse"):
                    found |= {
                        f"lstm_head.weight_ih_l{layer}{direction}": 4 * inner * inputs,
                        f"lstm_head.weight_hh_l{layer}{direction}": 4 * inner * inner,
                        f"lstm_head.bias_ih_l{layer}{direction}": 4 * inner,
                        f"lstm_head.bias_hh_l{layer}{direction}": 4 * inner,
                    }
        layers = {"mlp": [(0, outer, inner), (2, inner, inner), (4, inner, outer)],
                  "lstm": [(0, 2 * inner, 2 * inner), (2, 2 * inner, outer)]}  # fmt: skip
        for number, inputs, outputs in layers[options.encoder]:
            found |= {f"mlp_head.{number}.weight": inputs * outputs, f"mlp_head.{number}.bias": outputs}
        return {f"{ENCODER}.{name}": size for name, size in found.items()}


def _width(model: CausalLM) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


METHOD = PTuning()
