// Shows the drawing that Python sends, tells what lies under the pointer, and sends which button was pressed.

function keepState(model) {
  // JupyterLab saves the state of widgets only where its user has switched that on. Without it, a notebook that
  // is opened after its kernel has ended shows an error in the place of each widget. Ask for this notebook only.
  const manager = model.widget_manager;
  const saved = manager?.context?.saveState;
  if (!saved?.connect || typeof manager._saveState !== "function" || manager.__swarmkitKeeps) return;
  manager.__swarmkitKeeps = true;
  saved.connect((_, stage) => { if (stage === "started") manager._saveState(); });
}

function render({ model, el }) {
  keepState(model);
  const root = document.createElement("div");
  root.className = "swarmkit-live";
  const drawing = document.createElement("div");
  drawing.className = "sk-drawing";
  const buttons = document.createElement("div");
  buttons.className = "sk-buttons";
  const status = document.createElement("div");
  status.className = "sk-status";
  status.setAttribute("role", "status");
  root.append(drawing, buttons, status);
  el.append(root);

  let hidden = null;  // a drawing that came while the page was hidden
  const draw = () => {
    if (document.hidden) { hidden = true; return; }
    hidden = null;
    drawing.innerHTML = model.get("svg");  // made by our own Python, which escapes all text in it
    root.dataset.updates = String(Number(root.dataset.updates || 0) + 1);
  };
  const shown = () => { if (hidden) draw(); };
  const drawButtons = () => {
    const focused = document.activeElement?.dataset?.key;
    buttons.replaceChildren(...model.get("buttons").map((each) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = each.label;
      button.title = each.title;
      button.dataset.key = `${each.action} ${each.target}`;
      button.onclick = () => model.send({ action: each.action, target: each.target });
      return button;
    }));
    for (const button of buttons.children) if (button.dataset.key === focused) button.focus();
  };
  const tell = (text) => {
    const ended = model.get("ended") ? "This view has ended. " : "";
    status.textContent = ended + (text || model.get("notice"));
  };
  const plainTell = () => tell("");
  drawing.addEventListener("pointermove", (event) => {
    tell(event.target.querySelector?.(":scope > title")?.textContent);
  });
  drawing.addEventListener("pointerleave", plainTell);
  document.addEventListener("visibilitychange", shown);

  model.on("change:svg", draw);
  model.on("change:buttons", drawButtons);
  model.on("change:notice", plainTell);
  model.on("change:ended", plainTell);
  draw();
  drawButtons();
  plainTell();
  return () => {
    document.removeEventListener("visibilitychange", shown);
    model.off("change:svg", draw);
    model.off("change:buttons", drawButtons);
    model.off("change:notice", plainTell);
    model.off("change:ended", plainTell);
  };
}

export default { render };
