"""TMRoPE against Qwen2.5-Omni: the places of mixed sequences, and the angles made of them."""

import pytest
import torch
from contract import same, tokens
from transformers import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration,
    Qwen2_5OmniRotaryEmbedding,
    apply_rotary_pos_emb,
)

import models
from models.positions.tmrope import Audio, Recording, Text, TMRoPE, Vision, places
from models.stateful import Place

IMAGE, VIDEO, AUDIO, SEE, SEEN, HEAR, HEARD, WORD = range(100, 108)
MERGE = 2


def theirs(parts):
    """Their index of the same sequence, written as token ids with marks around what is not text."""
    config = Qwen2_5OmniThinkerConfig(
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO, position_id_per_seconds=25,
        seconds_per_chunk=2, vision_start_token_id=SEE, audio_start_token_id=HEAR,
    )  # fmt: skip
    config.image_token_id, config.video_token_id, config.audio_token_id = IMAGE, VIDEO, AUDIO
    ids, images, videos, seconds, sounds = [], [], [], [], []
    for part in parts:
        film = part.film if isinstance(part, Recording) else part
        if isinstance(film, Vision):
            grid, count = [film.frames, film.height * MERGE, film.width * MERGE], film.frames * film.height * film.width
        if isinstance(part, Text):
            ids += [WORD] * part.tokens
        elif isinstance(part, Audio):
            ids, sounds = [*ids, HEAR, *[AUDIO] * part.tokens, HEARD], [*sounds, part.tokens]
        elif isinstance(part, Recording):
            ids += [SEE, HEAR, *[VIDEO] * count, *[AUDIO] * part.sound.tokens, HEARD, SEEN]
            videos, seconds, sounds = [*videos, grid], [*seconds, film.seconds], [*sounds, part.sound.tokens]
        elif film.frames == 1:
            ids, images = [*ids, SEE, *[IMAGE] * count, SEEN], [*images, grid]
        else:
            ids, videos, seconds = [*ids, SEE, *[VIDEO] * count, SEEN], [*videos, grid], [*seconds, film.seconds]

    class Index(Qwen2_5OmniPreTrainedModelForConditionalGeneration):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.config, self.spatial_merge_size = config, MERGE

    ids = torch.tensor([ids])
    found, _ = Index().get_rope_index(
        ids,
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
        torch.ones_like(ids),
        any(isinstance(part, Recording) for part in parts),
        torch.tensor([4 * count for count in sounds]) if sounds else None,
        torch.tensor(seconds) if seconds else None,
    )
    return found[:, 0].T


def marked(parts):
    """Ours of the same sequence: marks are text, but those of a recording."""
    found = []
    for part in parts:
        found += [part] if isinstance(part, Text | Recording) else [Text(1), part, Text(1)]
    return places(found)


def test_places_of_mixed_sequences_are_theirs(pick):
    for _ in range(20):
        parts = [Text(pick.randint(1, 5))]
        for _ in range(pick.randint(1, 4)):
            parts.append(
                pick.choice(
                    [
                        Audio(pick.randint(1, 90)),
                        Vision(pick.randint(1, 4), pick.randint(1, 4)),
                        Vision(
                            pick.randint(1, 3), pick.randint(1, 3), pick.randint(2, 9), pick.choice([0.5, 1.0, 0.24])
                        ),
                    ]
                )
            )
            parts.append(Text(pick.randint(1, 3)))
        if not any(isinstance(part, Vision) for part in parts):
            parts += [Vision(2, 2), Text(1)]
        assert torch.equal(marked(parts), theirs(parts).long()), parts


def test_a_recording_alternates_as_theirs(pick):
    for _ in range(10):
        film = Vision(pick.randint(1, 3), pick.randint(1, 3), pick.randint(2, 9), pick.choice([0.5, 1.0]))
        last = int((film.frames - 1) * film.seconds * 25) + film.height + film.width
        # Theirs goes on after the last piece, which is after everything when the sound outlasts the film.
        parts = [Text(3), Recording(film, Audio(last + pick.randint(1, 80))), Text(2)]
        assert torch.equal(marked(parts), theirs(parts).long()), parts


def test_sound_stands_where_it_was_seen():
    """A frame and the sound of its moment share a time; half the frames a second, twice the step."""
    found = places([Recording(Vision(1, 1, 4, 1.0), Audio(100))])
    film = found[(found[:, 0] != found[:, 1]) | (found[:, 0] != found[:, 2])]
    assert film[:, 0].diff().tolist() == [25] * (len(film) - 1)
    assert places([Vision(1, 1, 4, 2.0)])[:, 0].tolist() == [0, 50, 100, 150]
    assert places([Vision(1, 1, 4, 1.0)])[:, 0].tolist() == [0, 25, 50, 75]


@pytest.mark.parametrize("shares", [(2, 3, 3), (16, 24, 24), (1, 1, 2)])
def test_angles_are_theirs(pick, shares):
    size = 2 * sum(shares) * pick.choice([1, 2])
    x, grid = torch.randn(2, 7, 3, size), torch.randint(40, (2, 7, 3))
    ours = TMRoPE(TMRoPE.Config(theta=1e4, shares=shares), size, 3, Place(0))(x, grid)
    config = Qwen2_5OmniThinkerConfig().text_config
    config.hidden_size, config.num_attention_heads, config.head_dim = 3 * size, 3, size
    sections = [share * (size // 2 // sum(shares)) for share in shares]
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    cos, sin = Qwen2_5OmniRotaryEmbedding(config)(x, grid.movedim(-1, 0))
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    same(ours, theirs.transpose(1, 2), 1e-5)


def test_text_alone_is_rope(pick):
    x, at = torch.randn(2, 7, 3, 16), torch.randint(50, (2, 7))
    scheme = TMRoPE(TMRoPE.Config(), 16, 3, Place(0))
    assert torch.equal(scheme(x, at), models.build("rope").blocks[0].mixer.positions(x, at))
    same(scheme(x, at[..., None].expand(-1, -1, 3)), scheme(x, at), 1e-6)


def test_a_decoder_takes_places(pick):
    decoder = models.build("tmrope")
    at = places([Text(2), Vision(2, 3), Text(3)])[None].expand(2, -1, -1)
    ids = tokens(decoder, 2, at.shape[1], 0)
    whole, _ = decoder.logits(ids, places_BTA=at)
    state = decoder.init_state(2, 20)
    first, state = decoder.logits(ids[:, :4], state, places_BTA=at[:, :4])
    rest, _ = decoder.logits(ids[:, 4:], state, places_BTA=at[:, 4:])
    same(torch.cat([first, rest], 1), whole)
    assert not torch.allclose(whole, decoder.logits(ids)[0], atol=1e-3)
