// Text as nodes. Only fenced code is markup, and everything is set as text: no output of a model can become HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;

/** [{code, language, text}]: runs of lines inside and outside of fences. An open fence is code up to the end. */
export function blocks(text) {
  const found = [];
  let mark = "", language = "", lines = [];
  const flush = (code) => {
    const text = lines.join("\n");
    if (code) found.push({ code, language, text });
    else if (text.trim()) found.push({ code, language: "", text: text.trim() });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const fence = line.match(FENCE);
    if (!mark && fence) {
      flush(false);
      [mark, language] = [fence[1], fence[2]];
    } else if (mark && fence && !fence[2] && fence[1].startsWith(mark)) {
      flush(true);
      [mark, language] = ["", ""];
    } else {
      lines.push(line);
    }
  }
  flush(Boolean(mark));
  return found;
}

/** Makes `node` show `text`; what has not changed stays, so that a selection in it survives the stream. */
export function show(node, text) {
  const wanted = blocks(text);
  wanted.forEach((block, index) => {
    let child = node.children[index];
    const kind = block.code ? `code ${block.language}` : "text";
    if (!child || child.dataset.kind !== kind) {
      const made = block.code ? codeBlock(block.language) : document.createElement("p");
      made.dataset.kind = kind;
      if (child) child.replaceWith(made);
      else node.append(made);
      child = made;
    }
    const leaf = block.code ? child.querySelector("code") : child;
    if (leaf.textContent === block.text) return;
    if (leaf.firstChild && block.text.startsWith(leaf.textContent)) {
      leaf.firstChild.appendData(block.text.slice(leaf.textContent.length));
    } else {
      leaf.textContent = block.text;
    }
  });
  while (node.children.length > wanted.length) node.lastElementChild.remove();
}

function codeBlock(language) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const code = document.createElement("code");
  const pre = document.createElement("pre");
  caption.append(language || "code", copyButton(() => code.textContent));
  pre.tabIndex = 0; // it scrolls, also without a mouse
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

export function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 1200);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
