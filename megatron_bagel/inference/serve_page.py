"""The page that ``--serve`` shows: one file without any outside resource, so it works on a machine without a network."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>megatron_bagel</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; color: #222; }
  form { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; align-items: end; }
  label { display: flex; flex-direction: column; font-size: 13px; color: #555; }
  .wide { grid-column: 1 / -1; }
  textarea, input, select, button { font: inherit; padding: .35rem; }
  #talk { margin-top: 1.2rem; }
  .turn { border-left: 3px solid #ccc; padding: .2rem .8rem; margin: .6rem 0; white-space: pre-wrap; }
  .model { border-color: #3a7; }
  .wrong { border-color: #c33; }
  .thought { color: #777; }
  img { max-width: 100%; image-rendering: pixelated; min-width: 8rem; }
</style>
<h1>megatron_bagel</h1>
<form id="ask">
  <label class="wide">Prompt<textarea id="prompt" rows="3" required></textarea></label>
  <label>What to do<select id="output">
    <option value="image">draw, or change the last image</option><option value="text">answer</option>
  </select></label>
  <label>Image<input id="image" type="file" accept="image/*"></label>
  <label>Seed<input id="seed" type="number" value="0"></label>
  <label>Steps<input id="steps" type="number" value="25" min="1" max="200"></label>
  <label>Text guidance<input id="text_scale" type="number" value="4" min="1" step="0.1"></label>
  <label>Image guidance<input id="img_scale" type="number" value="1.5" min="1" step="0.1"></label>
  <label>Size (HxW)<input id="size" placeholder="as the model likes"></label>
  <label>Think first<input id="think" type="checkbox"></label>
  <button id="send">Send</button><button id="again" type="button">Start again</button>
</form>
<div id="talk"></div>
<script>
  const $ = id => document.getElementById(id);
  let terms = [];
  const show = (kind, parts) => {
    const turn = document.createElement("div");
    turn.className = "turn " + kind;
    for (const [what, value] of parts) {
      const part = document.createElement(what === "image" ? "img" : "div");
      if (what === "image") part.src = value; else { part.textContent = value; part.className = what; }
      turn.append(part);
    }
    $("talk").append(turn);
    turn.scrollIntoView();
  };
  const read = file => new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
  $("again").onclick = () => { terms = []; $("talk").replaceChildren(); };
  $("ask").onsubmit = async event => {
    event.preventDefault();
    $("send").disabled = true;
    const asked = [...terms], said = [];
    try {
      if ($("image").files.length) {
        const image = await read($("image").files[0]);
        asked.push({ image });
        said.push(["image", image]);
      }
      asked.push({ text: $("prompt").value });
      said.push(["text", $("prompt").value]);
      show("user", said);
      const body = {
        terms: asked, output: $("output").value, seed: +$("seed").value, steps: +$("steps").value, think: $("think").checked,
        text_scale: +$("text_scale").value, img_scale: +$("img_scale").value, size: $("size").value,
      };
      const reply = await fetch("answer", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
      const answer = await reply.json();
      if (!reply.ok) throw new Error(answer.error);
      const parts = ["thought", "text", "image"].filter(what => what in answer).map(what => [what, answer[what]]);
      show("model", parts);
      terms = asked;
      for (const what of ["text", "image"]) if (what in answer) terms.push({ [what]: answer[what] });
      $("image").value = "";
    } catch (error) {
      show("wrong", [["text", error.message]]);
    } finally {
      $("send").disabled = false;
    }
  };
</script>
</html>
"""
