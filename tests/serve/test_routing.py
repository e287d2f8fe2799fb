"""Which replica gets a prompt: the one that has its beginning, as long as the loads are not too far apart."""

import random

from serve.replicas.router import BLOCK, Router

CHATS = [[user * 1000 + token for token in range(BLOCK * 4)] for user in range(12)]


def turns(router: Router, replicas: list[str], count: int, seed: int = 0) -> float:
    """Each chat grows turn by turn. The part of prompt tokens that were sent where they had been before."""
    rng, seen = random.Random(seed), {name: set() for name in replicas}
    prompts, found, asked = [list(chat) for chat in CHATS], 0, 0
    for _ in range(count):
        prompt = rng.choice(prompts)
        name = router.choose(prompt, {name: rng.randrange(3) for name in replicas})
        blocks = [tuple(prompt[: end + BLOCK]) for end in range(0, len(prompt) - BLOCK + 1, BLOCK)]
        found += sum(block in seen[name] for block in blocks)
        asked += len(blocks)
        seen[name].update(blocks)
        prompt += [rng.randrange(9999) for _ in range(BLOCK)]
    return found / asked


class Blind(Router):
    """The same without memory."""

    def _match(self, name, chain):
        return 0


def test_chats_stay_where_their_prefix_is():
    replicas = [f"r{index}" for index in range(8)]
    assert turns(Router(), replicas, 400) > 0.85
    assert turns(Blind(), replicas, 400) < 0.75


def test_a_loaded_replica_is_passed_over():
    router = Router(slack=4)
    assert router.choose(CHATS[0], {"a": 0, "b": 1}) == "a"
    assert router.choose(CHATS[0] + [1] * BLOCK, {"a": 5, "b": 1}) == "a"
    assert router.choose(CHATS[0], {"a": 6, "b": 1}) == "b"
    assert router.choose(CHATS[0], {"a": 1, "b": 2}) == "a"  # now both have it
    assert router.choose(CHATS[0], {"a": 3, "b": 2}) == "b"
    assert (router.routed, router.matched) == (5, 3)
    router.forget("b")
    assert router.choose(CHATS[0], {"a": 3, "b": 0}) == "a"


def test_the_longest_prefix_wins_and_keys_do_not_share():
    router = Router()
    router.choose(CHATS[0][: BLOCK * 2], {"a": 0})
    router.choose(CHATS[0], {"b": 0})
    assert router.choose(CHATS[0], {"a": 0, "b": 3}) == "b"
    assert router.choose(CHATS[0][: BLOCK * 2], {"a": 0, "b": 3}) == "a"
    assert router.choose(CHATS[0], {"a": 0, "b": 3}, key="other") == "a"
    assert router.choose(CHATS[0][: BLOCK - 1], {"a": 2, "b": 1}) == "b"  # less than a block: the lesser load


def test_without_a_prefix_two_are_compared():
    router, loads = Router(), {f"r{index}": 0 for index in range(16)}
    for index in range(1600):
        loads[router.choose([index * 3] * BLOCK, loads)] += 1
    assert max(loads.values()) - min(loads.values()) < 20


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("serve.replicas.router.REMEMBERED", 8)
    router = Router()
    for chat in CHATS:
        router.choose(chat, {"a": 0})
    assert len(router._seen["a"]) == 8
    router.choose(CHATS[-1], {"a": 5, "b": 0})
    assert router.matched == 1
