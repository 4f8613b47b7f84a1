// Builds the tabs that the server has, and switches between them by click, arrow keys and the address's #name.
import { el, getJSON, say } from "./common.js";

const list = document.querySelector("[role=tablist]");
const main = document.querySelector("main");

function show(name, focus = false) {
  for (const tab of list.children) {
    const chosen = tab.dataset.name === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(`panel-${tab.dataset.name}`).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  document.dispatchEvent(new CustomEvent("shown", { detail: name }));
}

list.addEventListener("keydown", (event) => {
  const tabs = [...list.children];
  const now = tabs.indexOf(document.activeElement);
  const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const tab = tabs[(to + tabs.length) % tabs.length];
  location.hash = tab.dataset.name;
  tab.focus();
});
window.addEventListener("hashchange", () => show(chosen()));

function chosen() {
  const names = [...list.children].map((tab) => tab.dataset.name);
  const asked = location.hash.slice(1);
  return names.includes(asked) ? asked : names[0];
}

async function start() {
  if (location.search) history.replaceState(null, "", location.pathname + location.hash); // the token is in a cookie now
  const server = await getJSON("/api/models");
  for (const name of document.body.dataset.tabs.split(" ").filter((name) => server.tabs.includes(name))) {
    const tab = await import(`./${name}.js`);
    const explanation = el("div", { class: "explain" }, ...tab.explain.map((line) => el("p", { html: line })));
    const section = el("section", {
      id: `panel-${name}`, role: "tabpanel", "aria-labelledby": `tab-${name}`, hidden: true,
    }, explanation);
    main.append(section);
    list.append(el("button", {
      id: `tab-${name}`, type: "button", role: "tab", "aria-controls": section.id, "data-name": name,
      onclick: () => { location.hash = name; },
    }, tab.title));
    await tab.build(section);
  }
  show(chosen());
  document.body.dataset.ready = "yes";
}

start().catch((error) => say(error.message));
