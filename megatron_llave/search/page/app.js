// The search page. Text from the server is only ever set as text, never as HTML.
"use strict";

const PAGE = 60;
const LARGEST_IMAGE = 29_000_000; // bytes; base64 makes a third more of them
const find = (id) => document.getElementById(id);
const grid = find("grid"), text = find("text"), template = find("tile");

let query = {}; // {text, image, imageName, imageUrl} or {like, likeName}; {}: all images
let results = []; // what is shown
let token = null, total = 0, searching = null, loadingMore = false, active = 0, viewed = -1;
let about = {};
const remembered = new Map(); // queries with images, for the browser's Back

const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const nameOf = (hit) => hit.files[0].split("/").pop();

async function ask(path, body, signal) {
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is llave search serve still running?");
  }
  const answer = await response.json().catch(() => ({ error: "The server's answer cannot be read." }));
  if (!response.ok) throw new Error(answer.error || "Something went wrong.");
  return answer;
}

function showError(message) {
  find("error").textContent = message;
  find("error").hidden = !message;
}

function titleOf() {
  if (query.like) return query.likeName ? `More like ${query.likeName}` : "More like this image";
  if (query.image && query.text) return `“${query.text}” with an image`;
  if (query.image) return "Similar to your image";
  return query.text ? `“${query.text}”` : "All images";
}

function showStatus(answer) {
  const isBrowsing = answer.token === undefined;
  let line = isBrowsing ? plural(total, "image") : `${plural(total, "image")}, most similar first`;
  if (!isBrowsing && total < answer.images) line = `The ${total.toLocaleString("en")} most similar of ${plural(answer.images, "image")}`;
  if (answer.exact === false) line += ` · ${answer.search}`;
  if (answer.seconds !== undefined) line += ` · ${answer.seconds < 1 ? `${Math.max(1, Math.round(1000 * answer.seconds))} ms` : `${answer.seconds.toFixed(1)} s`}`;
  find("status").textContent = line;
}

async function search(next, { remember = true } = {}) {
  searching?.abort();
  const controller = (searching = new AbortController());
  query = next;
  if (remember) push();
  find("progress").hidden = false;
  grid.setAttribute("aria-busy", "true");
  showError("");
  showQuery();
  try {
    const { text: words, image, like } = query;
    const body = like ? { like } : { ...(words && { text: words }), ...(image && { image }) };
    const answer = await ask("/api/search", { ...body, count: PAGE }, controller.signal);
    token = answer.token ?? null;
    total = answer.total;
    results = [];
    active = 0;
    grid.replaceChildren();
    append(answer.results);
    showStatus(answer);
    find("empty").hidden = answer.images > 0;
    window.scrollTo(0, 0);
  } catch (error) {
    if (error.name === "AbortError") return;
    token = null;
    total = 0;
    results = [];
    grid.replaceChildren();
    find("more").hidden = true;
    find("status").textContent = "";
    showError(error.message);
  }
  if (searching === controller) {
    find("progress").hidden = true;
    grid.removeAttribute("aria-busy");
  }
}

const nearEnd = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) more(); }, { rootMargin: "800px" });

async function more() {
  if (loadingMore || results.length >= total) return;
  loadingMore = true;
  const started = searching, offset = results.length;
  try {
    const answer = await ask("/api/search", { ...(token && { token }), offset, count: PAGE }, started?.signal);
    if (searching === started && results.length === offset) append(answer.results);
    if (searching === started && !answer.results.length) total = results.length;
  } catch (error) {
    if (error.name !== "AbortError") { showError(error.message); total = results.length; }
  } finally {
    loadingMore = false;
    find("more").hidden = results.length >= total;
  }
}

function append(hits) {
  const added = hits.map((hit) => makeTile(hit, results.push(hit) - 1));
  grid.append(...added);
  find("more").hidden = results.length >= total;
  nearEnd.unobserve(find("more"));
  nearEnd.observe(find("more")); // which reports at once if the end is still near
  setActive(Math.min(active, results.length - 1));
}

function makeTile(hit, number) {
  const tile = template.content.firstElementChild.cloneNode(true);
  const [open, image, gone, like] = ["open", "open img", "gone", "like"].map((name) => tile.querySelector(`.${name}`));
  const name = nameOf(hit);
  image.src = `/thumbnail/${hit.id}`;
  image.addEventListener("error", () => showGone(image, gone), { once: true });
  tile.querySelector(".name").textContent = name;
  tile.querySelector(".name").title = hit.files.join("\n");
  let label = name;
  if (hit.similarity !== undefined) {
    tile.querySelector(".similarity").hidden = false;
    tile.querySelector(".number").textContent = hit.similarity.toFixed(3);
    tile.querySelector(".meter span").style.width = `${100 * Math.min(1, Math.max(0, hit.similarity))}%`;
    label += `, similarity ${hit.similarity.toFixed(3)}`;
  }
  open.setAttribute("aria-label", `${label}. Open`);
  like.setAttribute("aria-label", `More like ${name}`);
  open.addEventListener("click", () => openView(number));
  like.addEventListener("click", () => searchLike(hit));
  tile.addEventListener("focusin", () => setActive(number));
  return tile;
}

async function showGone(image, place) {
  image.hidden = true;
  place.hidden = false;
  place.textContent = "This image cannot be shown.";
  const answer = await ask(image.getAttribute("src")).catch((error) => ({ error: error.message }));
  place.textContent = (answer.error || place.textContent).split(";")[0].replace(/\.$/, "") + ".";
}

function searchLike(hit) {
  text.value = "";
  removeImage();
  search({ like: hit.id, likeName: nameOf(hit) });
}

// The form and the image of a query

function showQuery() {
  find("title").textContent = titleOf();
  document.title = query.text || query.like || query.image ? `${titleOf()} · Image search` : "Image search";
  find("chip").hidden = !query.image;
  if (query.image) {
    find("chip-image").hidden = false;
    find("chip-image").src = query.imageUrl;
    find("chip-name").textContent = query.imageName;
  }
  text.placeholder = query.image ? "Add words" : "Describe what you look for";
}

function removeImage() {
  const { image, imageName, imageUrl, ...rest } = query;
  query = rest;
  find("chip").hidden = true;
  text.placeholder = "Describe what you look for";
}

function withText() {
  const { image, imageName, imageUrl } = query, words = text.value.trim();
  return { ...(words && { text: words }), ...(image && { image, imageName, imageUrl }) };
}

function toBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The image cannot be read."));
    reader.readAsDataURL(file);
  });
}

async function takeImage(file) {
  if (!file) return;
  if (file.size > LARGEST_IMAGE) return showError(`The image is too large: it may have ${LARGEST_IMAGE / 1_000_000} MB.`);
  try {
    const image = await toBase64(file), words = text.value.trim();
    if (!image) throw new Error("The file is empty or cannot be read.");
    search({ ...(words && { text: words }), image, imageName: file.name || "your image", imageUrl: URL.createObjectURL(file) });
  } catch (error) {
    showError(error.message);
  }
}

find("form").addEventListener("submit", (event) => { event.preventDefault(); search(withText()); });
find("choose").addEventListener("click", () => find("file").click());
find("file").addEventListener("change", () => { takeImage(find("file").files[0]); find("file").value = ""; });
find("chip-image").addEventListener("error", () => { find("chip-image").hidden = true; });
find("chip-remove").addEventListener("click", () => { removeImage(); text.focus(); search(withText()); });
find("home").addEventListener("click", (event) => { event.preventDefault(); text.value = ""; search({}); });
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); takeImage(file); }
});

let entered = 0; // elements that the dragged file is over
const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => { if (hasFile(event)) { entered += 1; find("drop").hidden = false; } });
document.addEventListener("dragleave", (event) => { if (hasFile(event) && --entered <= 0) { entered = 0; find("drop").hidden = true; } });
document.addEventListener("dragover", (event) => { if (hasFile(event)) { event.preventDefault(); event.dataTransfer.dropEffect = "copy"; } });
document.addEventListener("drop", (event) => {
  if (!hasFile(event)) return;
  event.preventDefault();
  entered = 0;
  find("drop").hidden = true;
  closeView();
  takeImage(event.dataTransfer.files[0]);
});

// The keyboard

function setActive(number) {
  for (const place of new Set([active, number])) {
    const tabIndex = place === number ? 0 : -1;
    grid.children[place]?.querySelectorAll("button").forEach((button) => { button.tabIndex = tabIndex; });
  }
  active = Math.max(0, number);
}

function columns() {
  const tops = [...grid.children].slice(0, 40).map((tile) => tile.offsetTop);
  const other = tops.findIndex((top) => top !== tops[0]);
  return other < 0 ? tops.length : other;
}

grid.addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(), Home: -active, End: results.length - 1 - active };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const next = Math.min(results.length - 1, Math.max(0, active + steps[event.key]));
  setActive(next);
  grid.children[next].querySelector(".open").focus();
  grid.children[next].scrollIntoView({ block: "nearest" });
});
grid.addEventListener("focus", () => grid.children[active]?.querySelector(".open").focus());
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea") || document.querySelector("dialog[open]");
  if (event.key === "/" && !isTyping) { event.preventDefault(); text.focus(); text.select(); }
});
text.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && results.length) { event.preventDefault(); grid.children[active].querySelector(".open").focus(); }
  if (event.key === "Backspace" && !text.value && query.image) find("chip-remove").click();
});

// The large view

function openView(number) {
  const hit = results[number], image = find("view-image");
  if (!hit) return;
  viewed = number;
  setActive(number);
  image.hidden = false;
  find("view-gone").hidden = true;
  image.src = `/image/${hit.id}`;
  image.alt = nameOf(hit);
  find("view-name").textContent = nameOf(hit);
  find("view-similarity-row").hidden = hit.similarity === undefined;
  find("view-similarity").textContent = hit.similarity?.toFixed(4) ?? "";
  find("view-files-label").textContent = hit.files.length > 1 ? plural(hit.files.length, "equal file") : "File";
  find("view-files").replaceChildren(...hit.files.map((file) => Object.assign(document.createElement("li"), { textContent: file })));
  find("view-previous").disabled = number === 0;
  find("view-next").disabled = number + 1 >= total;
  if (!find("view").open) find("view").showModal();
  if (number + 1 >= results.length) more();
}

async function turn(step) {
  if (viewed + step >= results.length) await more();
  openView(viewed + step);
}

function closeView() {
  if (find("view").open) find("view").close();
}

find("view-image").addEventListener("load", ({ target }) => { // a small image grows to twice its size at most
  target.style.maxWidth = `min(100%, ${2 * target.naturalWidth}px)`;
  target.style.maxHeight = `min(100%, ${2 * target.naturalHeight}px)`;
});
find("view-image").addEventListener("error", () => showGone(find("view-image"), find("view-gone")));
find("view").addEventListener("close", () => {
  const tile = grid.children[viewed];
  viewed = -1;
  tile?.querySelector(".open").focus();
});
find("view").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft" && viewed > 0) turn(-1);
  if (event.key === "ArrowRight" && viewed + 1 < total) turn(1);
});
find("view-close").addEventListener("click", closeView);
find("view-previous").addEventListener("click", () => turn(-1));
find("view-next").addEventListener("click", () => turn(1));
find("view-like").addEventListener("click", () => { const hit = results[viewed]; closeView(); searchLike(hit); });
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}

// About, history, and the first page

function showAbout() {
  const rows = [
    ["Images", `${plural(about.images, "image")} in ${plural(about.files, "file")}${about.unreadable ? `; ${plural(about.unreadable, "file")} cannot be read` : ""}`],
    ["Folder", about.pictures],
    ["Model", about.checkpoint],
    ["Search", about.search],
    ["Text with a query by words", about.prompts.text],
    ["Text with a query by an image", about.prompts.like],
    ["Text with a query by both", about.prompts.both],
  ];
  find("info-list").replaceChildren(...rows.map(([term, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: term }), Object.assign(document.createElement("dd"), { textContent: value }));
    return row;
  }));
  find("info").showModal();
}

find("about").addEventListener("click", async () => {
  try { about = await ask("/api/about"); showAbout(); } catch (error) { showError(error.message); }
});
find("info-close").addEventListener("click", () => find("info").close());
find("more").addEventListener("click", more);

function push() {
  const key = Math.random().toString(36).slice(2), address = new URLSearchParams();
  if (query.text) address.set("q", query.text);
  if (query.like) address.set("like", query.like);
  const before = remembered.get(history.state?.key);
  const isSame = before && ["text", "like", "image"].every((name) => before[name] === query[name]);
  remembered.set(key, query);
  history[isSame ? "replaceState" : "pushState"]({ key }, "", address.size ? `/?${address}` : "/");
}

function fromAddress() {
  const address = new URLSearchParams(location.search);
  const words = (address.get("q") ?? "").slice(0, 2000), like = address.get("like");
  return like ? { like } : words ? { text: words } : {};
}

function restore() {
  const next = remembered.get(history.state?.key) ?? fromAddress();
  text.value = next.text ?? "";
  search(next, { remember: false });
}

addEventListener("popstate", restore);
history.replaceState({ key: "first" }, "");
remembered.set("first", fromAddress());
restore();
ask("/api/about").then((answer) => {
  about = answer;
  find("empty-command").textContent = "llave search build --checkpoint CKPT --pictures DIR --out INDEX";
}).catch((error) => showError(error.message));
