"""A chat in the terminal with a server of OpenAI's API.

    python -m serve.chat [--url http://127.0.0.1:8000] [--model NAME] [--system TEXT] [--temperature 0.7] ...

Ctrl-C stops an answer, Ctrl-D or /quit ends. EDIFICE_API_KEY is sent where a server asks for a key. When the input is
no terminal, each line of it is a message and nothing but the answers is printed.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from serve.client import Client, ServerError

HELP = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/model [NAME]": "list the models, or go on with another",
    "/system [TEXT]": "show the system prompt, or set it; /system - removes it",
    "/save FILE": "write the conversation as JSON",
    "/quit": "end",
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # an answer could move the cursor or rename the window


@dataclass
class Chat:
    """A conversation and how to go on with it. options: further fields of each request."""

    client: Client
    model: str
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)  # of the last answer

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def answer(self, text: str) -> Iterator[str]:
        """Says `text` and yields the pieces of the answer. What came before it was stopped is kept as the answer; a
        message without an answer is forgotten."""
        turn = {"role": "assistant", "content": ""}
        self.turns += [{"role": "user", "content": text}, turn]
        self.usage = {}
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **self.options}
        try:
            if self.client.chats(self.model):
                path, body["messages"] = "/v1/chat/completions", self.messages()[:-1]
            else:
                path, body["prompt"] = "/v1/completions", text
                body.setdefault("max_tokens", 256)
            for chunk in self.client.stream(path, body):
                self.usage = chunk.get("usage") or self.usage
                for choice in chunk["choices"]:
                    piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    turn["content"] += piece
                    if piece:
                        yield piece
        finally:
            if not turn["content"]:
                del self.turns[-2:]


class Terminal:
    """The conversation of a person with `chat`."""

    def __init__(self, chat: Chat, console: Console) -> None:
        self.chat, self.console = chat, console

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # some that start programs make them deaf to it
        self._note(f"{self.chat.model} at {self.chat.client.url}; /help tells what else there is")
        while True:
            try:
                line = self._read()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:  # of the line, not of the program
                self.console.print()
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line.strip():
                    self._answer(line)
            except (ServerError, OSError) as error:
                self.console.print(str(error), style="red", markup=False, highlight=False)

    def _read(self) -> str:
        """A line, or several when each but the last ends with a backslash."""
        line = input("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n" + input(". ")
        return line

    def _answer(self, line: str) -> None:
        started, first, last, stopped = time.perf_counter(), 0.0, 0.0, False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True  # for an exception that arises within a destructor is lost
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, stop)
        try:
            for piece in self.chat.answer(line):
                if stopped:
                    raise KeyboardInterrupt
                last = time.perf_counter()
                first = first or last
                self.console.out(harmless(piece), end="", highlight=False)
        except KeyboardInterrupt:
            self.console.out(" [stopped]", end="", style="yellow", highlight=False)
        finally:
            signal.signal(signal.SIGINT, before)
            self.console.print()
        tokens = self.chat.usage.get("completion_tokens", 0)
        if tokens and first:
            parts = [f"{tokens} tokens", f"first after {1000 * (first - started):.0f} ms"]
            if tokens > 1 and last > first:
                parts.insert(1, f"{(tokens - 1) / (last - first):.0f} tokens/s")
            cached = (self.chat.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            self._note(", ".join(parts + [f"{cached} of the prompt cached"] * bool(cached)))

    def _command(self, name: str, given: str = "") -> None:
        chat = self.chat
        if name == "/clear":
            chat.turns.clear()
            self._note("forgotten")
        elif name == "/model" and given:
            chat.model = chat.client.choose(given)
            self._note(f"now {chat.model}")
        elif name == "/model":
            self._note("\n".join(f"{'*' if each == chat.model else ' '} {each}" for each in chat.client.models()))
        elif name == "/system":
            chat.system = "" if given == "-" else given or chat.system
            self._note(chat.system or "no system prompt")
        elif name == "/save" and given:
            record = {"model": chat.model, "messages": chat.messages()}
            Path(given).expanduser().write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
            self._note(f"{len(chat.turns)} messages are in {given}")
        else:
            known = "" if name == "/help" else f"{name} is not a command, or something is missing after it; there are\n"
            self._note(known + "\n".join(f"{command:<16}{text}" for command, text in HELP.items()))

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)


def harmless(text: str) -> str:
    """Without control characters but for ends of lines and tabs."""
    return _CONTROL.sub("\ufffd", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serve.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="of the server's; the first one when it is not given")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int)
    given = vars(parser.parse_args())
    client = Client(given.pop("url"), os.environ.get("EDIFICE_API_KEY", ""))
    try:
        model, system = client.choose(given.pop("model")), given.pop("system")
        chat = Chat(client, model, system, {name: value for name, value in given.items() if value is not None})
        if sys.stdin.isatty():
            import readline  # noqa: F401, which gives input() a history and keys to edit a line

            return Terminal(chat, Console()).run()
        for line in sys.stdin:
            if line.strip():
                for piece in chat.answer(line.rstrip("\n")):
                    print(piece, end="", flush=True)
                print(flush=True)
    except ServerError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
