// How fast an answer comes, and what it was spared: the prefix cache's tokens and the drafts that held.

export class Meter {
  constructor() {
    this.started = performance.now();
    this.first = this.last = null;
    this.tokens = this.begun = 0; // so far, and with the first piece
    this.cached = 0;
    this.drafts = null; // [accepted, drafted] while the answer came
    this.reason = "";
  }

  /** A chunk came with a piece of `text`, perhaps none, and the counts up to it. */
  see(text, usage) {
    if (usage) {
      this.tokens = usage.completion_tokens;
      this.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    if (text) {
      if (this.first === null) [this.first, this.begun] = [performance.now(), this.tokens];
      this.last = performance.now();
    }
  }

  get speed() {
    const seconds = (this.last - this.first) / 1000;
    return this.tokens > this.begun && seconds > 0.02 ? (this.tokens - this.begun) / seconds : 0;
  }

  /** [what it means, as it is shown] */
  parts() {
    const parts = [];
    if (this.first === null && !this.reason) return [["", "thinking…"]];
    parts.push(["tokens of the answer", `${this.tokens} token${this.tokens === 1 ? "" : "s"}`]);
    if (this.speed) parts.push(["speed after the first token", `${digits(this.speed)} tokens/s`]);
    if (this.first !== null) parts.push(["time to first token", `first after ${digits(this.first - this.started)} ms`]);
    if (this.cached) parts.push(["prompt tokens found in the prefix cache", `${this.cached} cached`]);
    if (this.drafts?.[1]) parts.push(["guessed tokens that held", `${this.drafts[0]} of ${this.drafts[1]} drafts`]);
    const ended = { stop: "", length: "cut off at its longest" }[this.reason] ?? this.reason;
    if (ended) parts.push(["why it ended", ended]);
    return parts;
  }
}

function digits(number) {
  return number < 10 ? number.toFixed(1) : String(Math.round(number));
}
