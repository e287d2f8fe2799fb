// The turns, kept for this tab, and how they look. Who answers them is not known here.

import { copyButton, show } from "./markup.js";

const KEPT = "edifice.turns";
const NAMES = { chat: { user: "You", assistant: "Model" }, completion: { user: "Prompt", assistant: "Completion" } };

export class Conversation {
  /** list: an <ol>. again(index): the turn at `index` is to be answered anew. */
  constructor(list, again) {
    this.list = list;
    this.again = again;
    this.turns = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
    this.turns.forEach((turn) => this.list.append(this.#item(turn)));
  }

  /** turn: {role, mode, text, error, parts}: parts as Meter tells them. */
  add(turn) {
    this.turns.push(turn);
    this.list.append(this.#item(turn));
    this.keep();
  }

  /** Forgets turn `index` and all after it. */
  cut(index) {
    this.turns.length = index;
    while (this.list.children.length > index) this.list.lastElementChild.remove();
    this.keep();
  }

  keep() {
    sessionStorage.setItem(KEPT, JSON.stringify(this.turns));
  }

  get last() {
    return this.turns.length - 1;
  }

  /** What a chat is asked for: turns with a text, and the system prompt before them. */
  messages(system) {
    const said = this.turns.filter((turn) => turn.mode === "chat" && turn.text);
    const messages = said.map(({ role, text }) => ({ role, content: text }));
    return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
  }

  /** Shows what the last turn has become. */
  update(busy = false) {
    const turn = this.turns[this.last], item = this.list.lastElementChild;
    item.classList.toggle("busy", busy);
    item.setAttribute("aria-busy", String(busy));
    this.#fill(item, turn);
  }

  #fill(item, turn) {
    const [body, wrong, foot] = ["body", "wrong", "foot"].map((name) => item.querySelector(`:scope > .${name}`));
    if (turn.mode === "chat" && turn.role === "assistant") show(body, turn.text);
    else body.textContent = turn.text;
    wrong.textContent = turn.error ?? "";
    const spans = (turn.parts ?? []).map(([title, text]) => {
      const span = document.createElement("span");
      span.title = title;
      span.textContent = text;
      return span;
    });
    foot.replaceChildren(...spans);
  }

  #item(turn) {
    const item = document.createElement("li");
    item.className = `turn ${turn.role} ${turn.mode}`;
    const head = document.createElement("div");
    head.className = "head";
    const name = document.createElement("h3");
    name.textContent = NAMES[turn.mode][turn.role];
    head.append(name, ...this.#buttons(turn, item));
    const [body, wrong, foot] = ["body", "wrong", "foot"].map((kind) => {
      const part = document.createElement("div");
      part.className = kind;
      return part;
    });
    item.append(head, body, wrong, foot);
    this.#fill(item, turn);
    return item;
  }

  #buttons(turn, item) {
    const button = (text, act) => {
      const made = document.createElement("button");
      made.type = "button";
      made.textContent = text;
      made.addEventListener("click", act);
      return made;
    };
    const index = () => [...this.list.children].indexOf(item);
    const own =
      turn.role === "user"
        ? button("Edit", () => this.edit(index()))
        : button("Again", () => this.again(index() - 1));
    own.classList.add("changes");
    return [copyButton(() => turn.text), own];
  }

  /** Opens the user's turn `index` for a correction; what came after it is forgotten once that is sent. */
  edit(index) {
    const turn = this.turns[index], item = this.list.children[index];
    if (item.querySelector("form")) return;
    const form = document.createElement("form");
    form.className = "editor";
    const box = document.createElement("textarea");
    box.value = turn.text;
    box.rows = Math.min(12, turn.text.split("\n").length + 1);
    box.setAttribute("aria-label", "Edit your message");
    const send = document.createElement("button");
    send.textContent = "Send";
    const cancel = document.createElement("button");
    cancel.type = "button";
    cancel.textContent = "Cancel";
    const body = item.querySelector(".body");
    const leave = () => {
      form.replaceWith(body);
      item.querySelector(".changes").focus();
    };
    cancel.addEventListener("click", leave);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (sends(event)) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!box.value.trim() || document.body.classList.contains("busy")) return;
      leave();
      turn.text = box.value;
      this.#fill(item, turn);
      this.again(index);
    });
    form.append(box, send, cancel);
    body.replaceWith(form);
    box.focus();
  }
}

/** Enter sends, unless a line is wanted or an input method is still composing. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
