"""What the directory of replicas knows of models that come and go. Without Ray: the class itself."""

import asyncio

import pytest

from serve.replicas import directory
from serve.replicas.directory import Directory, Model, Place


def model(name: str) -> Model:
    return Model(name, "/folder", 300, 100, application=f"model {name}")


def announce(known, name: str, idle: float):
    return known.announce(Place(model(name), f"replica of {name}", 1, "host", 1, b""), idle)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(directory, "ANNOUNCE_SECONDS", 0.1)
    monkeypatch.setattr(directory, "LOOK_SECONDS", 0.1)


def test_who_was_not_asked_for_the_longest_leaves_first():
    async def main():
        known = Directory.func_or_class(2)
        assert await known.load(model("a"), 1, []) == [] and await known.load(model("b"), 2, []) == []
        await announce(known, "a", idle=0.0)
        assert await known.load(model("c"), 3, ["b"]) == [model("a")], "b is older, and busy"
        news = await known.look()
        assert news.models.keys() == {"b", "c"} and news.shelf == {"a": (model("a"), 1)} and not news.places
        await announce(known, "a", idle=0.0)  # a replica on its way out
        assert not (await known.look()).places
        assert await known.load(model("a"), 1, ["b", "c"]) is None and (await known.look()).models.keys() == {"b", "c"}
        assert await known.load(model("a"), 1, []) == [model("b")]
        assert await known.forget("b") == "" and await known.forget("c") == "model c"
        assert (await known.look()).loaded.keys() == {"a"}

    asyncio.run(main())


def test_without_a_limit_nobody_leaves():
    async def main():
        known = Directory.func_or_class()
        for name in "abcd":
            assert await known.load(model(name), None, []) == []

    asyncio.run(main())


def test_another_life_knows_what_it_is_told():
    """Nothing seems to be gone to who knew it from the life before."""

    async def main():
        before = Directory.func_or_class(1)
        for name in ("a", "b"):
            await before.load(model(name), name, [])
        news = await before.look()
        after = Directory.func_or_class(1)
        looking = asyncio.create_task(after.look(news.version, news.loaded))
        await asyncio.sleep(0)
        await announce(after, "b", idle=1.0)
        again = await looking
        assert again.models == news.models and again.shelf == news.shelf and len(again.places) == 1

    asyncio.run(main())
