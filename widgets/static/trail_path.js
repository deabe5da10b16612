// From a token id on: its bytes, its row of the embedding, its position, its slot in the KV cache.

// The bits of a bfloat16 as sign, exponent and fraction.
function bitsText(bits) {
  const text = bits.toString(2).padStart(16, "0");
  return `${text[0]} ${text.slice(1, 9)} ${text.slice(9)}`;
}

const bf16View = new DataView(new ArrayBuffer(4));
function bf16Value(bits) {
  bf16View.setUint32(0, bits << 16);
  return bf16View.getFloat32(0);
}

// The UTF-8 of a text, in hexadecimal: "20 66 6f 78".
const asHex = (text) => Array.from(new TextEncoder().encode(text), (byte) => byte.toString(16).padStart(2, "0")).join(" ");

function makePath(ui) {
  const { client } = ui;
  const line = (name) => {
    const value = element("div", { class: "tv-trail-value" });
    return { value, node: element("div", { class: "tv-trail-stage" }, element("b", { text: name }), value) };
  };
  const stages = { bytes: line("bytes"), id: line("token id"), row: line("embedding"), position: line("position"), slot: line("KV slot") };
  const node = element("div", { class: "tv-trail-half" }, ...Object.values(stages).map((stage) => stage.node));
  let shownRow = null;

  const showRow = async (id) => {
    if (shownRow === id) return;
    shownRow = id;
    try {
      const answer = await ui.ask("trail.row", { token_id: id });
      if (shownRow !== id) return;
      const shape = `${asCount(answer.rows)} × ${asCount(answer.columns)}`;
      stages.row.value.replaceChildren(element("div", { text: `row ${asCount(id)} of ${answer.name}, ${shape}; it begins:` }),
        element("div", { class: "tv-trail-numbers" }, ...Array.from(answer.bits, (bits, column) => {
          const number = bf16Value(bits);
          return element("button", { class: "tv-trail-number tv-mono", type: "button", "data-bits": bits,
            "data-column": column, title: `column ${column}: ${number}. Open it in BitLens`,
            onclick: () => client.inspect?.({ kind: "weight", name: answer.name, row: id, column }) },
          element("span", { text: number.toPrecision(3) }), element("small", { text: bitsText(bits) }));
        }), element("span", { class: "tv-muted", text: `… ${asCount(answer.columns - answer.bits.length)} more` })));
      node.dataset.row = id;
    } catch (error) {
      if (shownRow === id) stages.row.value.textContent = client.live.kind === "replay" ? "not recorded" : error.message;
    }
  };

  // The characters that a token shares with its neighbours, in words.
  const splitText = (token, tokens) => {
    let first = tokens.indexOf(token), end = first + 1;
    while (first > 0 && tokens[first - 1].hex) first--;
    while (end < tokens.length && tokens[end].hex) end++;
    const all = tokens.slice(first, end).map((other) => other.hex).join(" ");
    const bytes = Uint8Array.from(all.split(" "), (hex) => parseInt(hex, 16));
    const whole = new TextDecoder().decode(bytes);
    const others = end - first;
    return others === 1 ? `Not whole characters: shown as U+FFFD (\uFFFD), since the rest never came.`
      : `Not whole characters: alone it would be U+FFFD (\uFFFD). ${others} tokens together, ${all.toUpperCase()}, are “${whole}”.`;
  };

  return {
    node,
    // token: {id, text, hex, special, at}; tokens: all of them; request: what the topic said, or null.
    show(token, tokens, request, sameBeginning) {
      node.hidden = !token;
      if (!token) return;
      // A recording has texts and no bytes: of a split character it knows only that.
      const isLost = token.text === null || (client.live.kind === "replay" && token.text.includes("\uFFFD"));
      const bytes = isLost || token.special ? "" : (token.hex || asHex(token.text)).toUpperCase();
      stages.bytes.value.replaceChildren(element("span", { class: "tv-mono",
        text: isLost ? "not recorded" : `“${visibleText(token.text)}”  ${bytes}` }));
      if (token.hex) stages.bytes.value.append(element("div", { class: "tv-trail-split", text: splitText(token, tokens) }));
      if (token.special) {
        stages.bytes.value.append(element("div", { text: "A special token: it stands for no text, it is a mark for the model." }));
      }
      stages.id.value.textContent = asCount(token.id);
      stages.position.value.textContent = `${asCount(token.at)}: the angle by which RoPE turns its queries and keys`;
      showRow(token.id);
      this.showSlot(token, request, sameBeginning);
    },
    showSlot(token, request, sameBeginning) {
      const { value } = stages.slot;
      delete node.dataset.block;
      delete node.dataset.offset;
      if (!token) return;
      if (!request || !request.request) { value.textContent = "none yet: select a request, for example in TokenRace"; return; }
      const who = `request ${request.request}`;
      if (!sameBeginning) {
        value.textContent = `none: ${who} begins with other tokens, and keys and values depend on all tokens before`;
        return;
      }
      if (!request.block_size) { value.textContent = "not known"; return; }
      const place = Math.floor(token.at / request.block_size), offset = token.at % request.block_size;
      const block = request.blocks[place];
      if (block === undefined) {
        value.textContent = request.blocks.length ? `${who} has no block for it yet`
          : `${who} holds no blocks (${request.status})`;
        return;
      }
      const isComputed = token.at < request.computed;
      const link = button(`block ${block}, offset ${offset}`, "select this block in every panel",
        () => client.select({ block, token: token.at }));
      const bits = button("K in bits", "the first value of its key, in the selected layer, in BitLens",
        () => client.inspect?.({ kind: "kv", part: "key", layer: client.selection.layer || 0, block, head: 0, offset, dim: 0 }));
      bits.disabled = !isComputed || client.live.kind === "replay";
      value.replaceChildren(link, " ", bits, element("div", {
        text: `block ${place} of ${who}'s own, since ${asCount(token.at)} = ${place} · ${request.block_size} + ${offset}; `
          + (!isComputed ? "still to be computed" : token.at < request.cached ? "keys and values came from the prefix cache"
            : "keys and values are computed") }));
      Object.assign(node.dataset, { block, offset });
    },
  };
}
