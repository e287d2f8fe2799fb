// The form beside the conversation: what is asked for with every request, and where it is kept.

const KEPT = "edifice.settings", KEY = "edifice.key";

export class Settings {
  constructor(form) {
    this.form = form;
    this.chat = true; // whether the model can
    this.wrong = document.getElementById("schema-wrong");
    const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
    for (const [name, value] of Object.entries(kept)) {
      if (form.elements[name]) form.elements[name].value = value;
    }
    form.elements.key.value = sessionStorage.getItem(KEY) ?? "";
    form.addEventListener("input", () => this.keep());
    form.addEventListener("submit", (event) => event.preventDefault());
    this.keep();
  }

  /** A key is for this tab only; the rest is for next time too. */
  keep() {
    const { key, ...rest } = Object.fromEntries(new FormData(this.form));
    sessionStorage.setItem(KEY, key);
    localStorage.setItem(KEPT, JSON.stringify(rest));
    for (const output of this.form.querySelectorAll("output")) {
      output.value = Number(this.form.elements[output.htmlFor.value].value).toFixed(2);
    }
    this.schema();
    document.body.dataset.mode = this.mode;
  }

  get key() {
    return this.form.elements.key.value.trim();
  }

  get mode() {
    return this.chat ? this.form.elements.mode.value : "completion";
  }

  /** The model has a chat template, or not. */
  offer(chat) {
    this.chat = chat;
    this.form.elements.mode[0].disabled = !chat;
    if (!chat) this.form.elements.mode.value = "completion";
    document.body.dataset.mode = this.mode;
  }

  /** The parsed schema; null without one, undefined when it is no JSON object. */
  schema() {
    const text = this.form.elements.schema.value.trim();
    this.wrong.textContent = "";
    if (!text) return null;
    try {
      const schema = JSON.parse(text);
      if (schema && typeof schema === "object" && !Array.isArray(schema)) return schema;
      this.wrong.textContent = "The schema must be a JSON object.";
    } catch (error) {
      this.wrong.textContent = `The schema is not JSON: ${error.message}`;
    }
    return undefined;
  }

  get system() {
    return this.form.elements.system.value;
  }

  /** The fields that chats and completions share. */
  request() {
    const body = { temperature: this.#number("temperature"), top_p: this.#number("top_p") };
    for (const name of ["top_k", "max_tokens", "seed"]) {
      const value = this.#number(name);
      if (value !== null) body[name] = value;
    }
    const stop = this.form.elements.stop.value.split("\n").filter(Boolean);
    if (stop.length) body.stop = stop.map((text) => text.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
    return body;
  }

  #number(name) {
    const { value } = this.form.elements[name];
    return value === "" ? null : Number(value);
  }
}
