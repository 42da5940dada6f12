// The pages of the tray. Values come from the worker, through the tray; all of them are put in as text.

const GIGA = 1e9, GIB = 2 ** 30;
const page = document.querySelector("#page");
const errorLine = document.querySelector("#error");
const toldLine = document.querySelector("#told");
let timer = null;

// ------------------------------------------------------------------ small helpers

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

async function ask(path, method = "GET", body = undefined) {
  const answer = await fetch(`/api/${path}`, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const value = await answer.json();
  if (!answer.ok) {
    const error = new Error(value.error);
    error.noWorker = Boolean(value.no_worker);
    throw error;
  }
  return value;
}

function tell(text) { toldLine.textContent = text; }

function showError(error) {
  errorLine.replaceChildren(error ? String(error.message || error) : "");
  if (error?.noWorker) {
    errorLine.append(" ", el("button", { type: "button", onclick: () => does(() => ask("start", "POST", {}), "The worker is being started.") }, "Start the worker"));
  }
  errorLine.hidden = !error;
}

async function does(work, done = "") {
  try {
    const value = await work();
    showError(null);
    if (done) tell(done);
    return value;
  } catch (error) {
    tell("");
    showError(error);
    return undefined;
  }
}

const count = (n) => n >= 1e6 ? `${(n / 1e6).toFixed(1)} million` : n >= 1e4 ? `${Math.round(n / 1e3)} thousand` : String(Math.round(n));
const tokens = (n) => n === 1 ? "1 token" : `${count(n)} tokens`;
const short = (n) => n.toFixed(1).replace(/\.0$/, "");
const size = (n) => n >= GIGA ? `${short(n / GIGA)} GB` : n >= 1e6 ? `${short(n / 1e6)} MB` : `${(n / 1e3).toFixed(0)} kB`;
// Memory is counted in powers of two, as the settings and the menu count it.
const memory = (n) => n >= GIB ? `${short(n / GIB)} GiB` : `${(n / 2 ** 20).toFixed(0)} MiB`;
const hours = (s) => s < 3600 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
const clock = (t) => new Date(t * 1000).toLocaleString([], { weekday: "short", hour: "2-digit", minute: "2-digit" });

function stateIcon(state) {
  const shapes = {
    working: ["#1971c2", svg("circle", { cx: 16, cy: 16, r: 15 }), svg("path", { d: "M12 9v14l12-7z", fill: "#fff" })],
    serving: ["#2f9e44", svg("circle", { cx: 16, cy: 16, r: 12, fill: "none", stroke: "#2f9e44", "stroke-width": 5 })],
    trouble: ["#e03131", svg("path", { d: "M16 1l15 29H1z" }), svg("path", { d: "M14.5 11h3v10h-3zM14.5 23h3v3h-3z", fill: "#fff" })],
    paused: ["#868e96", svg("path", { d: "M5 3h8v26H5zM19 3h8v26h-8z" })],
  };
  const shape = { starting: "serving", stopping: "paused" }[state] || state;
  const [fill, ...parts] = shapes[shape] || shapes.paused;
  return svg("svg", { width: 32, height: 32, viewBox: "0 0 32 32", fill, "aria-hidden": "true" }, ...parts);
}

function numbers(pairs) {
  return el("dl", { class: "numbers" }, ...pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

// ------------------------------------------------------------------ dashboard

const PAUSES = [
  ["For 15 minutes", { until: "seconds", seconds: 900 }], ["For 1 hour", { until: "seconds", seconds: 3600 }],
  ["Until tomorrow", { until: "tomorrow" }], ["Until I have been away for 30 minutes", { until: "away" }],
  ["Until I resume", { until: "resumed" }],
];

async function dashboard() {
  const state = el("section", { "aria-labelledby": "now" });
  const given = el("section", { "aria-labelledby": "given" });
  const limits = el("section", { "aria-labelledby": "limits" });
  const left = el("section", { "aria-labelledby": "left" });
  page.replaceChildren(state, given, limits, left);
  const refresh = async () => {
    const status = await does(() => ask("status"));
    if (!status) return;
    keepFocus(() => {
      state.replaceChildren(...statePart(status, refresh));
      limits.replaceChildren(...limitsPart(status));
    });
  };
  await refresh();
  const [stats, history] = (await does(() => Promise.all([ask("stats"), ask("history")]))) || [];
  if (stats) given.replaceChildren(...givenPart(stats, history));
  const things = await does(() => ask("belongings"));
  if (things) left.replaceChildren(...belongingsPart(things));
  timer = setInterval(() => { if (!document.hidden) refresh(); }, 2000);
}

function keepFocus(draw) {
  const key = document.activeElement?.dataset?.key;
  draw();
  if (key) page.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

function statePart(status, refresh) {
  const node = status.node;
  const parts = [
    el("h2", { id: "now" }, "Now"),
    el("p", { class: "state" }, stateIcon(status.troubles.length ? "trouble" : status.state), el("span", { id: "words" }, status.words)),
  ];
  for (const trouble of status.troubles) parts.push(el("p", {}, trouble));
  if (status.until) parts.push(el("p", { class: "soft" }, `This changes by itself: ${clock(status.until)}.`));
  if (node) {
    const blocks = node.blocks ? `blocks ${node.blocks[0]}:${node.blocks[1]}` : node.progress || "starting";
    parts.push(numbers([
      ["Model", status.model], ["Serves", blocks], ["Sessions", String(node.sessions)],
      ["Speed", `${node.tokens_per_s.toFixed(1)} tokens/s`], ["Processors", `${node.cpu_cores.toFixed(1)} cores`],
      ["Memory", memory(node.ram_bytes)],
    ]));
    if (node.peer_id) parts.push(el("p", { class: "soft" }, `Others see the identity ${node.peer_id} at ${node.addresses.join(", ") || "no address"}.`));
  }
  const act = (path, body, done) => async () => { await does(() => ask(path, "POST", body), done); refresh(); };
  const buttons = el("div", { class: "buttons" });
  if (status.reason === "not_agreed") {
    buttons.append(el("button", { type: "button", class: "main", "data-key": "wizard", onclick: () => { location.hash = "wizard"; } }, "Choose what to lend"));
  } else if (status.pause) {
    buttons.append(el("button", { type: "button", class: "main", "data-key": "resume", onclick: act("resume", {}, "Resumed.") }, "Resume"));
  } else {
    for (const [name, body] of PAUSES) {
      buttons.append(el("button", { type: "button", "data-key": name, onclick: act("pause", body, "Paused.") }, `Pause ${name[0].toLowerCase()}${name.slice(1)}`));
    }
    buttons.append(el("button", { type: "button", "data-key": "now", onclick: act("pause", { until: "resumed", haste: "now" }, "Stopped.") }, "Stop at once"));
  }
  parts.push(buttons);
  if (status.notes.length) {
    parts.push(el("details", {}, el("summary", {}, "What cannot be sensed on this computer"), el("ul", {}, ...status.notes.map((note) => el("li", {}, note)))));
  }
  return parts;
}

function givenPart(stats, history) {
  const most = stats.month_bytes_limit;
  const month = stats.month.sent_bytes + stats.month.received_bytes;
  return [
    el("h2", { id: "given" }, "What you have given"),
    numbers([
      ["Today", tokens(stats.today.tokens)], ["In all", tokens(stats.all.tokens)],
      ["Sessions helped", count(stats.all.sessions)], ["Served for", hours(stats.all.serving_s)],
      ["Data this month", most == null ? size(month) : `${size(month)} of ${size(most)}`],
    ]),
    el("h3", {}, "Tokens on each of the last 30 days"), plot(history),
  ];
}

function plot(history) {
  const width = 720, height = 150, low = 120;
  const most = Math.max(0, ...history.map((day) => day.totals.tokens));
  const step = width / Math.max(1, history.length);
  const sum = history.reduce((all, day) => all + day.totals.tokens, 0);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": `${tokens(sum)} in ${history.length} days, at most ${count(most)} on one day` });
  history.forEach((day, number) => {
    const tall = (low - 16) * day.totals.tokens / Math.max(1, most);
    const bar = svg("rect", { x: number * step + 2, y: low - tall, width: step - 4, height: Math.max(tall, 1), class: "bar" });
    bar.append(svg("title", {}, `${day.date}: ${tokens(day.totals.tokens)}, sessions: ${day.totals.sessions}`));
    picture.append(bar);
  });
  picture.append(svg("text", { x: 2, y: 11 }, tokens(most)));
  if (history.length) {
    picture.append(svg("text", { x: 2, y: height - 12 }, history[0].date), svg("text", { x: width - 2, y: height - 12, "text-anchor": "end" }, history.at(-1).date));
  }
  return picture;
}

function limitsPart(status) {
  const a = status.allowance;
  const rows = [
    ["Processor cores", a.cpu_cores ?? "no limit", status.node ? status.node.cpu_cores.toFixed(1) : "0"],
    ["Memory", memory(a.ram_bytes), memory(status.node?.ram_bytes ?? 0)],
    ["Disk for weights", memory(a.disk_bytes), memory(status.disk_bytes)],
    ["Data in a month", a.month_bytes == null ? "no limit" : size(a.month_bytes), size(status.month_bytes)],
    ["Upload", a.upload_bytes_per_s == null ? "no limit" : `${size(a.upload_bytes_per_s)}/s`, ""],
    ["Download", a.download_bytes_per_s == null ? "no limit" : `${size(a.download_bytes_per_s)}/s`, ""],
    ["Share of the GPU's memory", `${Math.round(a.gpu_memory_share * 100)} %`, status.node?.gpu_bytes ? memory(status.node.gpu_bytes) : ""],
    ["Temperature", `${a.temperature_c} °C`, ""],
  ];
  const heading = { "in use": "while you use the computer", away: "while you are away", unknown: "while it is not known whether you are there" }[status.presence];
  return [
    el("h2", { id: "limits" }, `Limits that hold now: ${heading}`),
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ...["Limit", "Allowed", "Used"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map(([name, most, used]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, String(most)), el("td", {}, used)))))),
  ];
}

function belongingsPart(things) {
  return [
    el("h2", { id: "left" }, "What swarmkit keeps on this computer"),
    el("p", {}, `${size(things.size_bytes)} in all. Removal takes it away, and shows these sizes first.`),
    el("ul", {}, ...things.parts.map((part) => el("li", {}, `${part.what}: ${part.path} (${size(part.size_bytes)})`))),
  ];
}

// ------------------------------------------------------------------ settings

const TITLES = {
  cpu_cores: "Processor cores", compute_share: "Share of time to compute", ram_bytes: "Memory", disk_bytes: "Disk for weights",
  disk_free_bytes: "Disk that stays free", upload_bytes_per_s: "Upload", download_bytes_per_s: "Download",
  month_bytes: "Data in a month", gpu_memory_share: "Share of the GPU's memory", gpu_watts: "GPU's power",
  temperature_c: "Highest temperature", busy_cpu: "Others' load of the processors", busy_gpu: "Others' load of the GPU",
  presence: "Who sits here", only_when_away: "Only when away", away_after_s: "Away after", on_battery: "On battery",
  on_metered: "On a metered connection", pause_for_full_screen: "Pause for full screen", pause_for_film: "Pause for films and music",
  pause_for_remote_session: "Pause for remote sessions", pause_for_gpu_programs: "Pause for other programs on the GPU",
  programs: "Pause for these programs", schedule: "Hours of the week", model: "Model", join: "Swarm to join",
  swarm_key: "Key of a private swarm", device: "Device", dtype: "Precision", num_blocks: "Number of blocks",
  name: "Public name", host: "Listen on", port: "Port", announce: "Addresses to announce", relay: "Use relays",
  drain_s: "Time for sessions to move away", history_days: "Days to remember",
};
const UNITS = {
  ram_bytes: [GIB, "GiB"], disk_bytes: [GIB, "GiB"], disk_free_bytes: [GIB, "GiB"], upload_bytes_per_s: [1e6 / 8, "Mbit/s"],
  download_bytes_per_s: [1e6 / 8, "Mbit/s"], month_bytes: [GIGA, "GB"], away_after_s: [60, "minutes"], drain_s: [1, "seconds"],
  gpu_watts: [1, "watts"], temperature_c: [1, "°C"], compute_share: [0.01, "%"], gpu_memory_share: [0.01, "%"],
  busy_cpu: [0.01, "%"], busy_gpu: [0.01, "%"], history_days: [1, "days"], cpu_cores: [1, "cores"],
};
const GROUPS = [["serve", "What is served"], ["rules", "When it may serve"], ["limits", "How much it may use"]];
const DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"];

const title = (name) => TITLES[name] || name.replaceAll("_", " ");
// The pages show larger units than the settings have.
const plain = (text) => (text || "").replaceAll("`", "").replace(/, in bytes( per second)?/, "").replace(/^Bytes of/, "Part of").replace(/^Seconds (for|without)/, "How long $1");

async function settings() {
  const found = await does(() => Promise.all([ask("schema"), ask("settings"), ask("autostart")]));
  if (!found) { page.replaceChildren(el("section", {}, el("p", {}, "The settings cannot be shown."))); return; }
  const [schema, values, start] = found;
  const form = el("form", { novalidate: true });
  const readers = {};
  for (const [group, heading] of GROUPS) {
    const section = el("section", { "aria-labelledby": `group-${group}` }, el("h2", { id: `group-${group}` }, heading));
    const properties = schema.$defs[{ serve: "Serve", rules: "Rules", limits: "WorkerLimits" }[group]].properties;
    readers[group] = {};
    for (const [name, described] of Object.entries(properties)) {
      const [field, read] = fieldFor(`${group}-${name}`, name, described, values[group][name]);
      readers[group][name] = read;
      section.append(field);
    }
    form.append(section);
  }
  const [autostart, readAutostart] = checkbox("autostart", "Start when I log in", "Off until you choose it.", start.on);
  form.append(
    el("section", { "aria-labelledby": "group-other" }, el("h2", { id: "group-other" }, "This program"), autostart),
    el("div", { class: "buttons" }, el("button", { class: "main" }, "Save")),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    does(async () => {
      const changes = {};
      for (const [group, fields] of Object.entries(readers)) {
        changes[group] = {};
        for (const [name, read] of Object.entries(fields)) {
          const value = read();
          if (JSON.stringify(value) !== JSON.stringify(values[group][name])) changes[group][name] = value;
        }
      }
      const now = await ask("settings", "PATCH", changes);
      for (const group of Object.keys(readers)) values[group] = now[group];
      await ask("autostart", "POST", { on: readAutostart() });
    }, "Saved. The settings hold from now on.");
  });
  page.replaceChildren(form);
}

function fieldFor(id, name, described, value) {
  const help = plain(described.description);
  if (name === "schedule") return weekField(id, help, value);
  if (name === "programs") return programsField(id, help, value);
  if (value !== null && typeof value === "object" && "in_use" in value) return twoFields(id, name, help, value);
  if (typeof value === "boolean") return checkbox(id, title(name), help, value);
  if (Array.isArray(value)) return lines(id, title(name), help, value);
  if (described.enum) return choice(id, title(name), help, described.enum, value);
  if (typeof value === "string") return text(id, title(name), help, value);
  return number(id, name, help, value);
}

function checkbox(id, label, help, value) {
  const input = el("input", { type: "checkbox", id, checked: value, "aria-describedby": `${id}-help` });
  return [el("div", { class: "field" }, input, " ", el("label", { for: id }, label), el("div", { class: "soft", id: `${id}-help` }, help)), () => input.checked];
}

function labelled(id, label, help, ...inputs) {
  return el("div", { class: "field" }, el("label", { for: id }, label), el("div", { class: "soft", id: `${id}-help` }, help), ...inputs);
}

function text(id, label, help, value) {
  const input = el("input", { type: "text", id, value, "aria-describedby": `${id}-help` });
  return [labelled(id, label, help, input), () => input.value.trim()];
}

function lines(id, label, help, value) {
  const input = el("textarea", { id, rows: 2, "aria-describedby": `${id}-help` }, value.join("\n"));
  return [labelled(id, label, `${help} One in each line.`, input), () => input.value.split("\n").map((line) => line.trim()).filter(Boolean)];
}

// A game is easier to choose while it runs than to name.
function programsField(id, help, value) {
  const [field, read] = lines(id, title("programs"), help, value);
  const names = field.querySelector("textarea");
  const running = el("select", { id: `${id}-running`, onchange: () => {
    if (running.value && !read().includes(running.value)) names.value = [...read(), running.value].join("\n");
    running.value = "";
  } }, el("option", { value: "" }, "choose …"));
  field.append(el("div", {}, el("label", { for: `${id}-running` }, "Add a program that runs now"), " ", running));
  ask("programs").then((found) => running.append(...found.map((name) => el("option", { value: name }, name))), () => {});
  return [field, read];
}

function choice(id, label, help, options, value) {
  const input = el("select", { id, "aria-describedby": `${id}-help` }, ...options.map((option) => el("option", { value: option, selected: option === value }, option)));
  return [labelled(id, label, help, input), () => input.value];
}

function numberInput(id, name, label, value) {
  const [unit, shown] = UNITS[name] || [1, ""];
  const input = el("input", { type: "number", id, step: "any", value: value == null ? "" : String(+(value / unit).toFixed(4)), "aria-label": label, placeholder: "no limit" });
  const read = () => {
    if (input.value.trim() === "") return null;
    const exact = Number(input.value) * unit;
    return Number.isInteger(value) || (value == null && name !== "gpu_watts") ? Math.round(exact) : exact;
  };
  return [input, shown, read];
}

function number(id, name, help, value) {
  const [input, shown, read] = numberInput(id, name, title(name), value);
  return [labelled(id, title(name), help, input, ` ${shown}`), read];
}

function twoFields(id, name, help, value) {
  const [used, shown, readUsed] = numberInput(`${id}-in_use`, name, `${title(name)} while you use the computer`, value.in_use);
  const [away, , readAway] = numberInput(`${id}-away`, name, `${title(name)} while you are away`, value.away);
  const field = el("fieldset", { class: "field" }, el("legend", {}, title(name)), el("div", { class: "soft" }, help),
    el("span", { class: "pair" }, "in use ", used, ` ${shown}`), el("span", { class: "pair" }, "away ", away, ` ${shown}`));
  return [field, () => ({ in_use: readUsed(), away: readAway() })];
}

function weekField(id, help, value) {
  const boxes = {};
  const body = el("tbody", {}, ...DAYS.map((day) => el("tr", {}, el("th", { scope: "row" }, day[0].toUpperCase() + day.slice(1)),
    ...Array.from({ length: 24 }, (_, hour) => {
      const box = el("input", { type: "checkbox", checked: value[day][hour] === "#", "aria-label": `${day} ${hour} o'clock` });
      (boxes[day] ||= []).push(box);
      return el("td", {}, el("label", {}, box));
    }))));
  const head = el("thead", {}, el("tr", {}, el("td", {}), ...Array.from({ length: 24 }, (_, hour) => el("th", { scope: "col" }, String(hour)))));
  const field = el("fieldset", { class: "field", id }, el("legend", {}, title("schedule")),
    el("div", { class: "soft" }, "Blue hours may serve. Click an hour, or move with Tab and press Space."),
    el("div", { class: "scroll" }, el("table", { class: "week" }, head, body)));
  return [field, () => Object.fromEntries(DAYS.map((day) => [day, boxes[day].map((box) => (box.checked ? "#" : ".")).join("")]))];
}

// ------------------------------------------------------------------ log

async function log() {
  const text = el("pre", { tabindex: 0, "aria-label": "Log" });
  page.replaceChildren(el("section", { "aria-labelledby": "log" }, el("h2", { id: "log" }, "What the worker wrote last"), text));
  const refresh = async () => {
    const found = await does(() => ask("log"));
    if (found) text.textContent = found.join("\n") || "nothing yet";
  };
  await refresh();
  text.scrollTop = text.scrollHeight;
  timer = setInterval(() => { if (!document.hidden) refresh(); }, 3000);
}

// ------------------------------------------------------------------ first steps

const STEPS = ["What this does", "What you lend", "When", "Begin"];

async function wizard() {
  const found = await does(() => Promise.all([ask("settings"), ask("computer")]));
  if (found) showStep(0, ...found, {});
}

// Asks nothing: an answer on its way would let a second click open the same step again, over what was typed there.
function showStep(step, values, here, chosen) {
  const next = (more) => showStep(step + 1, values, here, { ...chosen, ...more });
  const part = [whatItDoes, whatYouLend, when, begin][step](values, here, chosen, next);
  page.replaceChildren(
    el("ol", { class: "steps", "aria-label": "Steps" }, ...STEPS.map((name, number) => el("li", { "aria-current": number === step ? "step" : null }, `${number + 1}. ${name}`))),
    part,
  );
  part.querySelector("h2").focus();
}

function stepPart(heading, content, nextLabel, onNext, ...more) {
  const form = el("form", { novalidate: true }, el("section", { "aria-labelledby": "step" }, el("h2", { id: "step", tabindex: -1 }, heading), ...content,
    el("div", { class: "buttons" }, el("button", { class: "main" }, nextLabel), ...more)));
  form.addEventListener("submit", (event) => { event.preventDefault(); onNext(); });
  return form;
}

function whatItDoes(values, here, chosen, next) {
  const later = el("button", { type: "button", onclick: () => { location.hash = "dashboard"; } }, "Not now");
  return stepPart("Lend this computer to a swarm", [
    el("p", {}, "swarmkit runs parts of a language model on this computer for other people, while you do not need it."),
    el("h3", {}, "What runs"),
    el("p", {}, "One program that loads a part of the model and computes with it. It takes no code from others: what comes from them is numbers, which are checked."),
    el("h3", {}, "What others can see"),
    el("p", {}, "Your internet address, a random identity, the name that you choose, and which part of the model you serve. Nothing of your files. You, in turn, compute with the hidden states of other people's texts."),
    el("h3", {}, "How to stop"),
    el("p", {}, "One click in the tray pauses it: computing ends within a second, and the memory is free within three. Quit ends it. Nothing starts by itself when you log in, unless you choose so."),
  ], "Go on", () => next({}), later);
}

function whatYouLend(values, here, chosen, next) {
  const { computer, suggested } = here;
  const devices = [["cpu", `Processors: ${computer.cores} cores`], ...computer.gpus.map((gpu) => [gpu.device, `${gpu.name}, ${memory(gpu.memory)}`])];
  const first = chosen.device || suggested.serve.device;
  const radios = devices.map(([device, name]) => el("div", { class: "field" },
    el("input", { type: "radio", name: "device", id: `device-${device}`, value: device, checked: device === first }), " ", el("label", { for: `device-${device}` }, name)));
  const result = el("p", { class: "soft", role: "status" });
  const device = () => page.querySelector("input[name=device]:checked").value;
  const test = el("button", { type: "button", onclick: async () => {
    test.disabled = true;
    result.textContent = "Testing; this takes some seconds …";
    const found = await does(() => ask("test", "POST", { device: device() }));
    test.disabled = false;
    result.textContent = found ? `It works: ${found.name}, ${found.tflops} TFLOP/s, ${found.gb_per_s} GB/s.` : "";
  } }, "Test it");
  const limits = suggested.limits;
  const [ramUsed, , readUsed] = numberInput("ram-used", "ram_bytes", "Memory while you use the computer, in GiB", limits.ram_bytes.in_use);
  const [ramAway, , readAway] = numberInput("ram-away", "ram_bytes", "Memory while you are away, in GiB", limits.ram_bytes.away);
  const [coresUsed, , readCoresUsed] = numberInput("cores-used", "cpu_cores", "Cores while you use the computer", limits.cpu_cores.in_use);
  const [coresAway, , readCoresAway] = numberInput("cores-away", "cpu_cores", "Cores while you are away", limits.cpu_cores.away);
  const [disk, , readDisk] = numberInput("disk", "disk_bytes", "Disk for weights, in GiB", limits.disk_bytes.away);
  return stepPart("What do you lend?", [
    el("fieldset", {}, el("legend", {}, "Where to compute"), ...radios, test, result),
    el("fieldset", { class: "field" }, el("legend", {}, "Limits (suggested for this computer; more under Settings)"),
      el("p", {}, "Processor cores: ", el("span", { class: "pair" }, "in use ", coresUsed), el("span", { class: "pair" }, "away ", coresAway)),
      el("p", {}, "Memory: ", el("span", { class: "pair" }, "in use ", ramUsed, " GiB"), el("span", { class: "pair" }, "away ", ramAway, " GiB")),
      el("p", {}, "Disk for weights ", disk, " GiB")),
  ], "Go on", () => next({ device: device(), limits: {
    cpu_cores: { in_use: readCoresUsed(), away: readCoresAway() }, ram_bytes: { in_use: readUsed(), away: readAway() },
    disk_bytes: { in_use: readDisk(), away: readDisk() } } }));
}

function when(values, here, chosen, next) {
  const [away, readAway] = checkbox("w-away", "Only while nobody uses this computer", "After five minutes without input you count as away.", values.rules.only_when_away);
  const [battery, readBattery] = checkbox("w-battery", "Also on battery", "", values.rules.on_battery);
  const [film, readFilm] = checkbox("w-film", "Pause while a film plays or a program fills the screen", "", values.rules.pause_for_film);
  return stepPart("When?", [away, battery, film], "Go on", () => next({ rules: {
    only_when_away: readAway(), on_battery: readBattery(), pause_for_film: readFilm(), pause_for_full_screen: readFilm() } }));
}

function begin(values, here, chosen, next) {
  const [join, readJoin] = lines("b-join", "Invite link or addresses of the swarm", "Empty: begin a swarm of your own.", values.serve.join);
  const [model, readModel] = text("b-model", "Model", "tiny-chat, a folder, or a repository of the Hub. Ask the people of your swarm which one they run.", values.serve.model);
  const about = el("p", { class: "soft", role: "status" });
  join.append(about);
  join.querySelector("textarea").addEventListener("change", async () => {
    about.textContent = "";
    showError(null);
    for (const link of readJoin().filter((line) => line.startsWith("swarmkit:"))) {
      const found = await does(() => ask("invite", "POST", { link }));
      if (!found) return;
      about.textContent = `The link leads to a ${found.private ? "private" : "public"} swarm${found.model ? ` of ${found.model}` : ""}, and is good until ${new Date(found.expires_at * 1000).toLocaleDateString()}.`;
      if (found.model && !readModel()) model.querySelector("input").value = found.model;
    }
  });
  const [name, readName] = text("b-name", "Public name", "How others see this computer; may stay empty.", values.serve.name);
  const [start, readStart] = checkbox("b-start", "Start when I log in", "", false);
  const nothing = el("button", { type: "button", onclick: () => { location.hash = "dashboard"; } }, "Do nothing yet");
  return stepPart("Begin", [join, model, name, start], "Begin to lend", () => does(async () => {
    await ask("settings", "PATCH", {
      agreed: true, rules: chosen.rules, limits: chosen.limits,
      serve: { device: chosen.device, model: readModel(), join: readJoin(), name: readName() },
    });
    if (readStart()) await ask("autostart", "POST", { on: true });
    location.hash = "dashboard";
  }, "You lend this computer now. The tray's menu stops it at any time."), nothing);
}

// ------------------------------------------------------------------ which page

const PAGES = { dashboard, settings, log, wizard };

async function show() {
  clearInterval(timer);
  showError(null);
  const name = location.hash.slice(1);
  const chosen = PAGES[name] ? name : "dashboard";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${chosen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.page = chosen;
  await PAGES[chosen]();
}

addEventListener("hashchange", () => { tell(""); show(); });
show();
