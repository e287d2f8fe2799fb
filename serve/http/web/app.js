// The page: what a key or a button does.

import { Refused, get, stream } from "./api.js";
import { Conversation, sends } from "./conversation.js";
import { Meter } from "./meter.js";
import { Settings } from "./settings.js";

const COMPLETION = 256; // tokens of a completion for which no number was given
const at = (id) => document.getElementById(id);
const [log, prompt, notice, picker] = ["log", "prompt", "notice", "model"].map(at);

const settings = new Settings(at("options"));
const conversation = new Conversation(at("turns"), answer);
let running = null; // the AbortController of the answer that is coming
let known = {}; // by model: what /stats tells

// -- models ---------------------------------------------------------------------------------------------------------

async function connect() {
  try {
    const { data } = await get("v1/models", settings.key);
    await look();
    const before = picker.value || sessionStorage.getItem("edifice.model");
    const talk = data.filter(({ id }) => known[id]);
    picker.replaceChildren(...talk.map(({ id }) => new Option(id, id)));
    if (talk.some(({ id }) => id === before)) picker.value = before;
    choose();
    tell("");
  } catch (error) {
    complain(error);
  }
}

async function look() {
  known = (await get("stats", settings.key)).models;
}

function choose() {
  sessionStorage.setItem("edifice.model", picker.value);
  settings.offer(known[picker.value]?.chat ?? false);
  modes();
}

function modes() {
  const chat = settings.mode === "chat";
  prompt.placeholder = chat ? "Message" : "Text to be continued";
  at("prompt-label").textContent = prompt.placeholder;
  at("greeting").textContent = chat ? "What shall it be?" : "How does it begin?";
  at("options").elements.max_tokens.placeholder = chat ? "as many as fit" : String(COMPLETION);
  for (const part of document.querySelectorAll("[data-mode]")) {
    if (part !== document.body) part.hidden = part.dataset.mode !== settings.mode;
  }
}

/** The model's counters now: [accepted, drafted]. */
function drafts() {
  const numbers = known[picker.value] ?? {};
  return [numbers.accepted ?? 0, numbers.drafted ?? 0];
}

// -- answers --------------------------------------------------------------------------------------------------------

/** Answers the user's turn `index`; what came after it is forgotten. */
async function answer(index) {
  if (running) return;
  const schema = settings.schema();
  if (schema === undefined) {
    panel(true);
    return at("options").elements.schema.focus();
  }
  const { mode } = settings, model = picker.value;
  conversation.cut(index + 1);
  const asked = conversation.turns[index];
  asked.mode = mode;
  const options = { include_usage: true, continuous_usage_stats: true };
  const body = { model, ...settings.request(), stream: true, stream_options: options };
  if (mode === "chat") {
    body.messages = conversation.messages(settings.system);
    if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  } else {
    body.prompt = asked.text;
    body.max_tokens ??= COMPLETION;
  }
  const turn = { role: "assistant", mode, text: "" }, meter = new Meter();
  conversation.add(turn);
  running = new AbortController();
  busy(true);
  tell("");
  follow(true);
  let before = null, frame = 0;
  const draw = () => {
    frame = 0;
    turn.parts = meter.parts();
    follow(false, () => conversation.update(Boolean(running)));
  };
  const count = async () => {
    await look().catch(() => {}); // numbers beside the answer, which goes on without them
    const now = drafts();
    before ??= now;
    meter.drafts = now.map((number, each) => number - before[each]);
  };
  draw();
  const counting = count();
  const clock = setInterval(count, 1000);
  try {
    await counting; // or the first drafts would be missed
    meter.started = performance.now();
    for await (const chunk of stream(`v1/${mode === "chat" ? "chat/" : ""}completions`, body, settings.key, running.signal)) {
      const [choice] = chunk.choices;
      const text = choice?.delta?.content ?? choice?.text ?? "";
      turn.text += text;
      meter.see(text, chunk.usage);
      meter.reason = choice?.finish_reason ?? meter.reason;
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    meter.reason = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") turn.error = complain(error);
  } finally {
    clearInterval(clock);
    cancelAnimationFrame(frame);
    running = null;
    await count();
    draw();
    conversation.keep();
    busy(false);
    at("announce").textContent = turn.error ? "" : `Answer: ${turn.text}`;
  }
}

function send() {
  const text = prompt.value;
  if (running || !text.trim() || !picker.value) return;
  prompt.value = "";
  grow();
  conversation.add({ role: "user", mode: settings.mode, text });
  answer(conversation.last);
}

function stop() {
  running?.abort();
}

// -- what is seen ---------------------------------------------------------------------------------------------------

function busy(on) {
  document.body.classList.toggle("busy", on);
  const [hidden, shown] = on ? ["send", "stop"] : ["stop", "send"];
  at(shown).hidden = false;
  if (document.activeElement === at(hidden)) at(shown).focus();
  at(hidden).hidden = true;
  for (const button of document.querySelectorAll(".changes")) button.disabled = on;
  if (on) at("announce").textContent = "Answering";
}

/** Keeps the end in sight while `change` makes the log longer, unless the reader has scrolled away. */
function follow(always, change = () => {}) {
  const near = always || log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (near) log.scrollTop = log.scrollHeight;
}

function tell(text) {
  notice.textContent = text;
}

/** Says what went wrong, and where to mend it; the text. */
function complain(error) {
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) {
    tell(error.message);
    panel(true);
    at("options").elements.key.focus();
  } else if (!running) {
    tell(error.message);
  }
  return error.message;
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

let watching = 0;
function panel(open) {
  at("settings").hidden = !open;
  at("toggle").setAttribute("aria-expanded", String(open));
  clearInterval(watching);
  if (open) {
    watching = setInterval(() => look().then(numbers, () => {}), 2000);
    numbers();
  }
}

/** What the server says of the chosen model. */
function numbers() {
  const n = known[picker.value] ?? {};
  const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)}%` : "–");
  const rows = [
    ["Running, waiting", `${n.running ?? "–"}, ${n.waiting ?? "–"}`],
    ["Memory in use", share(n.pages_used, n.pages_total)],
    ["Prompt tokens found cached", share(n.prefix_hits, n.prefix_queries)],
    ["Drafted tokens accepted", share(n.accepted, n.drafted)],
    ["Longest context", n.max_len ? `${n.max_len} tokens` : "–"],
  ];
  at("server").replaceChildren(
    ...rows.flatMap((row) => row.map((text, place) => {
      const part = document.createElement(place ? "dd" : "dt");
      part.textContent = text;
      return part;
    })),
  );
}

// -- keys and buttons -----------------------------------------------------------------------------------------------

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !prompt.value && !running) {
    const index = conversation.turns.findLastIndex((turn) => turn.role === "user");
    if (index < 0) return;
    event.preventDefault();
    conversation.edit(index);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!at("settings").hidden) {
    panel(false);
    at("toggle").focus();
  }
});
at("stop").addEventListener("click", stop);
at("clear").addEventListener("click", () => {
  stop();
  conversation.cut(0);
  tell("");
  prompt.focus();
});
at("toggle").addEventListener("click", () => panel(at("settings").hidden));
at("close").addEventListener("click", () => {
  panel(false);
  at("toggle").focus();
});
at("options").addEventListener("input", modes);
at("options").elements.key.addEventListener("change", connect);
picker.addEventListener("change", () => {
  choose();
  numbers();
});

connect();
panel(matchMedia("(min-width: 64rem)").matches);
grow();
