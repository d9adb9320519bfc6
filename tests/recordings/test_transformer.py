"""Attention blocks beside torch's own, and what masks must keep out."""

import pytest
import torch
from torch import nn

from nissl.errors import InputError
from nissl.recordings.transformer import Block, Encoder, sinusoid


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_is_torch_s_encoder_layer(norm_first, causal):
    torch.manual_seed(0)
    mine = Block(12, 3, hidden=20, norm_first=norm_first).eval()
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", batch_first=True, norm_first=norm_first).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([mine.query.weight, mine.key_value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([mine.query.bias, mine.key_value.bias]))
        theirs.self_attn.out_proj.load_state_dict(mine.out.state_dict())
        theirs.linear1.load_state_dict(mine.feed[0].state_dict())
        theirs.linear2.load_state_dict(mine.feed[2].state_dict())
        for norm, own in ((theirs.norm1, mine.norm_attention), (theirs.norm2, mine.norm_feed)):
            own.weight.uniform_(0.5, 1.5)
            norm.load_state_dict(own.state_dict())
        x = torch.randn(2, 5, 12)
        mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
        assert torch.allclose(mine(x, causal=causal), theirs(x, src_mask=mask), atol=1e-5)


def test_what_is_masked_has_no_influence_and_weights_are_those_of_forward():
    torch.manual_seed(0)
    block = Block(8, 2).eval()
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([True, True, False, False])[None, None, None]
    other = context.clone()
    other[:, 2:] = 99.0
    assert torch.equal(block(x, context, mask=mask), block(x, other, mask=mask))
    weights = block.attention(x, context, mask=mask)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 3), atol=1e-6)
    assert float(weights[..., 2:].detach().abs().max()) == 0
    values = block.key_value(context).unflatten(-1, (2, 2, 4))[:, :, 1].transpose(1, 2)
    mixed = block.out((weights @ values).transpose(1, 2).flatten(2))
    after = x + mixed
    assert torch.allclose(block(x, context, mask=mask), after + block.feed(block.norm_feed(after)), atol=1e-5)


def test_a_query_that_may_attend_nowhere_gets_nothing():
    torch.manual_seed(0)
    block = Block(8, 2).eval()
    x = torch.randn(1, 3, 8)
    nowhere = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    out = block(x, mask=nowhere)
    alone = x + block.out.bias
    assert torch.allclose(out, alone + block.feed(block.norm_feed(alone)), atol=1e-6)
    assert float(block.attention(x, mask=nowhere).detach().abs().sum()) == 0


def test_causal_tokens_do_not_see_later_ones():
    torch.manual_seed(0)
    encoder = Encoder(2, 8, 2).eval()
    x = torch.randn(1, 6, 8)
    later = x.clone()
    later[:, 4:] *= -1  # a shift alone would be taken out by the norm
    assert torch.allclose(encoder(x, causal=True)[:, :4], encoder(later, causal=True)[:, :4], atol=1e-6)
    assert not torch.allclose(encoder(x)[:, :4], encoder(later)[:, :4], atol=1e-3)


def test_sinusoids_of_a_hand_case():
    s = sinusoid(3, 4)
    assert s.shape == (3, 4)
    t = torch.arange(3.0)
    assert torch.allclose(s, torch.stack([t.sin(), (t / 100).sin(), t.cos(), (t / 100).cos()], -1), atol=1e-6)
    assert torch.equal(sinusoid(torch.tensor([2.0]), 4)[0], s[2])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Block(10, 3), "multiple"),
        (lambda: Block(8, 0), "n_heads"),
        (lambda: Block(8, 2, dropout=1.0), "dropout"),
        (lambda: sinusoid(3, 5), "even"),
        (lambda: Block(8, 2)(torch.zeros(1, 2, 8), mask=torch.zeros(1, 1, 2, 2)), "True"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
