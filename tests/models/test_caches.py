"""The compressed cache below its full budget: what it holds against a plain oracle, and what it exists for."""

import contract
import pytest
import torch
from contract import documents, in_chunks, real, same, settled, tokens

import kernels
import models
from models.caches.full import Full
from models.caches.kv_compression import KVCompression
from models.config import make_config
from models.span import Span, localize
from models.state import bytes_per_row, bytes_per_token
from serve.engine import Engine
from serve.sampler import Sampling

POLICIES = ("heavy_hitter", "sliding")


def cache_of(heads=2, size=16, **options):
    return KVCompression(make_config(KVCompression, options), heads, size, size**-0.5)


def decoder_of(pick=None, **options):
    cache = f"kv_compression({','.join(f'{name}={value}' for name, value in options.items())})"
    window = pick.choice([0, 5]) if pick else 0
    return models.build("decoder", pattern=f"gqa(cache={cache},window={window})").eval()


def fresh(cache, rows):
    return {name: spec.empty(rows, 1) for name, spec in cache.state_spec(torch.float32).items()}


def feed(cache, q, k, v, cuts=(), state=None):
    """The outputs of a cache that is called with a row in pieces, one document, and its state."""
    state, outputs = state or fresh(cache, len(q)), []
    for start, end in zip([0, *cuts], [*cuts, q.shape[1]]):
        at = Span(torch.arange(start, end).expand(len(q), -1), length_B=torch.full((len(q),), start))
        y, state = cache(kernels.attention, *(x[:, start:end] for x in (q, k, v)), at, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_how_calls_are_cut_does_not_matter(pick, policy):
    """One call, any chunks and single tokens, with documents and padding, are the same outputs and the same store."""
    decoder = decoder_of(pick, budget=pick.choice([4, 9]), bits=16, policy=policy)

    def check(decoder, seed):
        ids = tokens(decoder, 3, 40, seed)
        sparse = torch.where(torch.rand(3, 40) < 0.03, 1, 0).cumsum(1)
        for segments in (None, documents(3, 40, seed), torch.where(torch.rand(3, 40) < 0.2, -1, sparse)):
            steps, stepped = in_chunks(decoder, ids, range(1, 40), decoder.init_state(3, 40), segments)
            for cuts in ([], sorted(pick.sample(range(1, 40), pick.randint(1, 6)))):
                chunks, state = in_chunks(decoder, ids, cuts, decoder.init_state(3, 40), segments)
                same(real(chunks, segments), real(steps, segments), what=f"cut at {cuts}")
                again = tokens(decoder, 3, 3, seed + 1)
                same(decoder.logits(again, state)[0], decoder.logits(again, stepped)[0], what="going on")

    settled(check, decoder, pick.randrange(1 << 30))


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_nor_does_it_in_low_bits(pick, policy, bits):
    """The very codes, of a layer alone: in a stack a number may round to its neighbour where its inputs round."""
    cache = cache_of(budget=pick.choice([4, 9, 16]), bits=bits, policy=policy)
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    steps, stepped = feed(cache, q, k, v, range(1, 40))
    for cuts in ([], sorted(pick.sample(range(1, 40), 5))):
        chunks, state = feed(cache, q, k, v, cuts)
        torch.testing.assert_close(chunks, steps, rtol=1e-4, atol=1e-5)
        held = (40 - cache.config.budget) % cache.dropped or cache.dropped
        for name in state.keys() - {"weight"}:
            assert torch.equal(state[name][:, : cache.left + held], stepped[name][:, : cache.left + held]), name


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_padding_and_rollback_below_the_budget(pick, policy):
    decoder = decoder_of(pick, budget=6, bits=16, policy=policy)
    for check in (contract.kept_states, contract.padding_writes_nothing, contract.snapshots):
        settled(check, decoder, pick.randrange(1 << 30))
    ids, keep = tokens(decoder, 2, 30, 1), torch.rand(2, 30) < 0.6
    together, _ = decoder.logits(ids, decoder.init_state(2, 30), torch.where(keep, 0, -1))
    for row in range(2):
        alone, _ = decoder.logits(ids[row, keep[row]][None], decoder.init_state(1, 30))
        same(together[row, keep[row]], alone[0], what="a padded row")


def held_by_hand(q, k, v, budget, policy):
    """One row token by token with lists: outputs, and the indices each head holds in the end."""
    tokens, heads = q.shape[0], k.shape[1]
    per, dropped = q.shape[1] // heads, max(1, budget // 8)
    left, outputs = budget - dropped, torch.zeros_like(q)
    lists = []
    for g in range(heads):
        held, weight = [], {}
        for t in range(tokens):
            if len(held) == budget:
                if policy == "sliding":
                    sinks = min(4, left // 4)
                    held = held[:sinks] + held[sinks + dropped :]
                else:
                    old, recent = held[: budget - left // 2], held[budget - left // 2 :]
                    best = sorted(old, key=lambda j: -weight[j])[: left - len(recent)]
                    held = sorted(best) + recent
            held, weight[t] = [*held, t], 0.0
            for h in range(g * per, (g + 1) * per):
                p = (k[held, g] @ q[t, h] * q.shape[2] ** -0.5).softmax(0)
                outputs[t, h] = p @ v[held, g]
                for j, share in zip(held, p.tolist()):
                    weight[j] += share
        lists.append(held)
    return outputs, lists


@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_what_lists_by_hand_hold(pick, policy):
    """Every slot of every head, and what is read of them."""
    heads, per, budget, length = pick.choice([1, 2]), pick.choice([1, 3]), pick.choice([4, 8, 17]), pick.randint(30, 50)
    q, k, v = torch.randn(length, heads * per, 16), torch.randn(length, heads, 16), torch.randn(length, heads, 16)
    q = 3 * q  # weights far apart, or the oldest always win
    cache = cache_of(heads, budget=budget, bits=16, policy=policy)
    y, state = feed(cache, q[None], k[None], v[None], cuts=[pick.randint(1, 9), pick.randint(10, 29)])
    outputs, lists = held_by_hand(q, k, v, budget, policy)
    torch.testing.assert_close(y[0], outputs, rtol=1e-4, atol=1e-5)
    for g, held in enumerate(lists):
        torch.testing.assert_close(state["k"][0, : len(held), g], k[held, g])
        torch.testing.assert_close(state["v"][0, : len(held), g], v[held, g])


@torch.no_grad()
def test_within_the_budget_it_is_the_full_cache(pick):
    length = pick.randint(20, 40)
    q, k, v = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16), torch.randn(2, length, 2, 16)
    at = Span(torch.arange(length).expand(2, -1))
    whole, _ = Full(Full.Config(), 2, 16, 0.25)(kernels.attention, q, k, v, at, None)
    for policy in POLICIES:
        inside, _ = feed(cache_of(budget=length, bits=16, policy=policy), q, k, v, cuts=[7])
        torch.testing.assert_close(inside, whole, rtol=1e-4, atol=1e-5)
        over, _ = feed(cache_of(budget=length - 9, bits=16, policy=policy), q, k, v, cuts=[7])
        torch.testing.assert_close(over[:, : length - 9], whole[:, : length - 9], rtol=1e-4, atol=1e-5)
        assert (over - whole).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("length", [70, 200])
def test_a_needle_is_kept_by_its_weight_and_lost_by_a_window(pick, length):
    """One key that every query asks for, not among the first; its value is still read after many budgets of tokens."""
    place, direction = pick.randint(15, 35), torch.nn.functional.normalize(torch.randn(16), dim=0)
    k, v = torch.randn(1, length, 1, 16) * 0.1, torch.zeros(1, length, 1, 16)
    k[0, place, 0], v[0, place, 0] = direction * 4, 1.0
    q = (direction * 8 + torch.randn(1, length, 2, 16) * 0.1).expand(1, length, 2, 16)
    for bits in (16, 4):
        found = {}
        for policy in POLICIES:
            y, _ = feed(cache_of(1, budget=24, bits=bits, policy=policy), q, k, v, cuts=[15, 60])
            assert y[0, place + 1].mean() > 0.9
            found[policy] = y[0, -1].mean().item()
        assert found["heavy_hitter"] > 0.9 and found["sliding"] < 0.01, found


@torch.no_grad()
def test_low_bits_err_by_their_step(pick):
    """No number is off by more than half a step, but for the half floats of a scale; fewer bits, larger errors."""
    x = torch.randn(3, 5, 2, 64) * torch.rand(3, 5, 2, 1) * 10 ** pick.uniform(-1, 2)
    x[0, 0] = 0.0
    q, k, v = torch.randn(2, 40, 4, 64), torch.randn(2, 40, 2, 64), torch.randn(2, 40, 2, 64)
    exact, _ = feed(cache_of(size=64, budget=40, bits=16), q, k, v)
    errors = []
    for bits in (8, 4, 2):
        cache = cache_of(size=64, bits=bits)
        packed = cache._packed("k", x)
        assert packed["k"].dtype == torch.uint8 and packed["k"].shape[-1] == 64 * bits // 8
        off = (cache._unpacked("k", packed, x.dtype) - x).abs().unflatten(-1, (-1, 32))
        groups = x.unflatten(-1, (-1, 32))
        span = groups.amax(-1) - groups.amin(-1)
        most = span / (2**bits - 1) / 2 + 1e-3 * (span + groups.abs().amax(-1)) + 1e-5
        assert (off.amax(-1) <= most * 1.001).all()
        assert (off.amax(-1) > most * 0.3).float().mean() > 0.5  # and the bits are all used
        errors.append((feed(cache_of(size=64, budget=40, bits=bits), q, k, v)[0] - exact).norm() / exact.norm())
    assert errors[0] < 0.01 < errors[1] < 0.2 and 2 * errors[1] < errors[2] < 1.0, errors


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_do_not_grow(policy):
    """A row of any length takes the bytes of its budget, and a sixteenth of the numbers' in fp32 with 2 bits."""
    decoder = decoder_of(budget=16, bits=2, policy=policy)
    spec = decoder.state_spec(100_000)
    assert bytes_per_token(spec) == 0 and bytes_per_row(spec, 100_000) == bytes_per_row(spec, 10)
    numbers = 16 * 2 * 16 * 2  # slots, key heads, channels, keys and values
    scales, weights = 16 * 2 * 2 * 2 * 2, 16 * 2 * 4 * (policy == "heavy_hitter")
    assert bytes_per_row(spec, 10) == 2 * 8 + decoder.config.layers * (numbers // 4 + scales + weights)
    _, state = in_chunks(decoder, tokens(decoder, 2, 90, 0), [50, 51], decoder.init_state(2, 1000))
    assert sum(x.numel() * x.itemsize for x in state.values()) == 2 * bytes_per_row(spec, 10)


def test_an_engine_serves_within_the_bytes_of_the_budget():
    """Many more rows than a full cache would have in these bytes; at full budget its very tokens."""
    torch.manual_seed(0)
    small, plain = decoder_of(budget=16, bits=4), models.build("decoder").eval()
    greedy = Sampling(max_tokens=30, temperature=0.0)
    prompts = [[1, 2, 3] * n for n in (1, 9, 20)]
    memory = 8 * 2 * bytes_per_row(small.state_spec(512), 512)
    engine = Engine(small, max_rows=8, max_len=512, memory_bytes=memory, chunk=13)
    results = engine.generate(prompts, greedy)
    assert engine.memory.rows == 8 and engine.memory.bytes <= memory < bytes_per_row(plain.state_spec(512), 512)
    assert [len(result.tokens) for result in results] == [30] * 3
    whole = Engine(small, max_rows=1, max_len=512, chunk=256)
    assert results[2].tokens == whole.generate(prompts[2:], greedy)[0].tokens
    roomy = decoder_of(budget=100, bits=16)
    roomy.load_state_dict(plain.state_dict())
    expected = [result.tokens for result in Engine(plain, max_len=512).generate(prompts, greedy)]
    assert [result.tokens for result in Engine(roomy, max_len=512).generate(prompts, greedy)] == expected


def test_a_prompt_within_the_budget_is_one_attention():
    """Prefill walks over evictions, not over tokens."""
    calls = []

    def attend(q, view):
        calls.append(q.shape[1])
        return kernels.attention(q, view)

    x = torch.randn(1, 100, 2, 16)
    for length, widths in ((64, [64]), (100, [64, 8, 8, 8, 8, 4])):
        cache, at = cache_of(budget=64), Span(torch.arange(length).expand(1, -1))
        cache(attend, x[:, :length], x[:, :length], x[:, :length], at, fresh(cache, 1))
        assert calls == widths
        calls.clear()


@torch.no_grad()
def test_compiled_calls_drop_alike(pick):
    """One graph, although it cannot know which tokens drop others; with documents, padding and a carried row."""
    torch.compiler.reset()
    cache = cache_of(budget=pick.choice([4, 9]), bits=pick.choice([16, 4]))
    q, k, v = torch.randn(2, 28, 4, 16), torch.randn(2, 28, 2, 16), torch.randn(2, 28, 2, 16)
    _, state = feed(cache, q, k, v)
    compiled = torch.compile(cache, backend="eager", fullgraph=True)
    length_B = torch.tensor([28, 28])
    for segments in (None, documents(2, 4, pick.randrange(1 << 30))):
        if segments is None:
            at = Span(torch.arange(28, 32).expand(2, -1), length_B=length_B)
        else:
            local, positions = localize(segments, length_B, torch.zeros_like(length_B))
            at = Span(positions, segments_BT=local, length_B=length_B)
        new = (torch.randn(2, 4, heads, 16) for heads in (4, 2, 2))
        call = (kernels.attention, *new, at, state)
        for ours, theirs in zip(compiled(*call), cache(*call)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option,word", [("budget=3", "budget"), ("bits=3", "16 or 8"), ("policy=lru", "sliding")])
def test_mistakes(option, word):
    with pytest.raises(ValueError, match=word) as error:
        models.build("gqa", cache=f"kv_compression({option})")
    assert "\n" not in str(error.value)
