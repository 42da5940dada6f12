// Shows the drawing that Python sends, tells what lies under the pointer or at the keyboard's place, and sends which
// button was pressed.

function keepState(model) {
  // JupyterLab saves the state of widgets only where its user has switched that on. Without it, a notebook that
  // is opened after its kernel has ended shows an error in the place of each widget. Ask for this notebook only.
  const manager = model.widget_manager;
  const saved = manager?.context?.saveState;
  if (!saved?.connect || typeof manager._saveState !== "function" || manager.__swarmkitKeeps) return;
  manager.__swarmkitKeeps = true;
  saved.connect((_, stage) => { if (stage === "started") manager._saveState(); });
}

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

function render({ model, el }) {
  keepState(model);
  const root = document.createElement("div");
  root.className = "swarmkit-live";
  root.dataset.lmSuppressShortcuts = "true";  // or JupyterLab takes arrow keys and Enter for the notebook
  const drawing = document.createElement("div");
  drawing.className = "sk-drawing";
  drawing.tabIndex = 0;
  drawing.setAttribute("role", "application");  // so that screen readers hand the arrow keys on
  drawing.setAttribute("aria-roledescription", "drawing");
  const buttons = document.createElement("div");
  buttons.className = "sk-buttons";
  buttons.setAttribute("role", "group");
  buttons.setAttribute("aria-label", "Servers");
  const status = document.createElement("div");
  status.className = "sk-status";
  status.setAttribute("role", "status");
  root.append(drawing, buttons, status);
  el.append(root);

  let hidden = false;  // whether a drawing came while the page was hidden
  let at = -1;  // the part that the keyboard has reached; -1 = none
  const told = (part) => part?.querySelector(":scope > title")?.textContent ?? part?.getAttribute("title");
  const parts = () => [...drawing.querySelectorAll("title, span[title]")]
    .map((found) => (found.localName === "title" ? found.parentElement : found));
  const mark = () => {
    const all = parts();
    at = Math.min(at, all.length - 1);
    if (at < 0) return null;
    all[at].classList.add("sk-at");
    return told(all[at]);
  };
  const draw = () => {
    if (document.hidden) { hidden = true; return; }
    hidden = false;
    const tokens = model.get("tokens");
    // Both are made by our own Python, which escapes all text in them.
    drawing.innerHTML = model.get("svg") + (tokens ? `<div class="sk-tokens">${tokens}</div>` : "");
    drawing.setAttribute("aria-label", `${model.get("summary")}. The arrow keys tell each part.`);
    mark();
    root.dataset.updates = String(Number(root.dataset.updates || 0) + 1);
  };
  const shown = () => { if (hidden) draw(); };
  const drawButtons = () => {
    const focused = buttons.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const wanted = model.get("buttons");
    buttons.hidden = wanted.length === 0;
    buttons.replaceChildren(...wanted.map((each) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = each.label;
      button.title = each.title;
      button.dataset.key = `${each.action} ${each.target}`;
      button.onclick = () => model.send({ action: each.action, target: each.target });
      return button;
    }));
    if (focused === null) return;
    // The keyboard stays in the view, also where the button that it pressed has gone.
    const same = [...buttons.children].find((button) => button.dataset.key === focused);
    (same ?? buttons.lastElementChild ?? drawing).focus();
  };
  const tell = (text) => {
    const ended = model.get("ended") ? "This view has ended. " : "";
    status.textContent = ended + (text || model.get("notice"));
  };
  const plainTell = () => tell("");
  const walk = (event) => {
    const last = parts().length - 1;
    if (last < 0) return;
    drawing.querySelector(".sk-at")?.classList.remove("sk-at");
    if (event.key in STEPS) at = Math.max(0, Math.min(last, at + STEPS[event.key]));
    else if (event.key === "Home") at = 0;
    else if (event.key === "End") at = last;
    else if (event.key === "Escape") at = -1;
    else { mark(); return; }
    event.preventDefault();
    event.stopPropagation();
    tell(mark());
  };
  const left = () => {
    drawing.querySelector(".sk-at")?.classList.remove("sk-at");
    at = -1;
    plainTell();
  };
  drawing.addEventListener("keydown", walk);
  drawing.addEventListener("blur", left);
  drawing.addEventListener("pointermove", (event) => {
    tell(told(event.target.closest?.("g, rect, span[title]")) ?? told(event.target.closest?.("g")));
  });
  drawing.addEventListener("pointerleave", plainTell);
  document.addEventListener("visibilitychange", shown);

  model.on("change:svg", draw);
  model.on("change:tokens", draw);
  model.on("change:buttons", drawButtons);
  model.on("change:notice", plainTell);
  model.on("change:ended", plainTell);
  draw();
  drawButtons();
  plainTell();
  return () => {
    document.removeEventListener("visibilitychange", shown);
    model.off("change:svg", draw);
    model.off("change:tokens", draw);
    model.off("change:buttons", drawButtons);
    model.off("change:notice", plainTell);
    model.off("change:ended", plainTell);
  };
}

export default { render };
