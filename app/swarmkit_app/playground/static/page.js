// What the page itself knows: which click came when, and the conversations, which stay in this browser.
// The events of the page call these functions; a value that they leave undefined stays as it is.

window.swarmkit = (() => {
  const KEY = "swarmkit-playground";
  const MOST_KEPT = 60;  // conversations and versions; the oldest go first
  const MOST_LETTERS = 500_000;  // they are written several times a second while an answer grows
  let turn = 0;
  let left = 0;  // the turn at which another conversation was wished for
  let keeps = stored("localStorage", `${KEY}-keeps`) !== false;
  let unkept = [];  // stands in for what is kept, where nothing is to be kept
  let place = stored("sessionStorage", KEY) ?? newPlace();

  // A browser may forbid the page to store anything, or have no room; the page works without.
  function stored(where, key) {
    try {
      return JSON.parse(window[where].getItem(key));
    } catch {
      return null;
    }
  }

  function store(where, key, text) {
    try {
      if (text === null) window[where].removeItem(key);
      else window[where].setItem(key, text);
    } catch { /* as above */ }
  }

  function newPlace() {
    return { chat: `${Date.now().toString(36)}${Math.random().toString(36).slice(2)}`, version: 1 };
  }

  function goTo(there) {
    place = there;
    store("sessionStorage", KEY, keeps ? JSON.stringify(place) : null);
  }

  function all() {
    return keeps ? stored("localStorage", KEY) ?? [] : unkept;
  }

  function write(entries) {
    let kept = entries.slice(0, MOST_KEPT);
    if (!keeps) {
      unkept = kept;
      return;
    }
    let text = JSON.stringify(kept);
    while (kept.length > 1 && text.length > MOST_LETTERS) {
      kept = kept.slice(0, -1);
      text = JSON.stringify(kept);
    }
    store("localStorage", KEY, text);
  }

  const keyOf = (entry) => `${entry.chat} ${entry.version}`;
  const here = (entry, at = place) => keyOf(entry) === keyOf(at);

  function textOf(content) {
    const parts = Array.isArray(content) ? content : [content];
    return parts.map((part) => (typeof part === "string" ? part : part?.text ?? "")).join("");
  }

  function labels(entries) {
    return entries.map((entry) => {
      const asked = entry.messages.filter((message) => message.role === "user").map((each) => textOf(each.content));
      const title = (asked[0] ?? "").replace(/\s+/g, " ").slice(0, 48);
      const versions = entries.filter((other) => other.chat === entry.chat).length;
      return [versions > 1 ? `${title} · version ${entry.version}` : title, keyOf(entry)];
    });
  }

  function picker(entries) {
    const value = entries.some((entry) => here(entry)) ? keyOf(place) : null;
    return { __type__: "update", choices: labels(entries), value };
  }

  function keep(messages, at = place) {
    if (!messages?.length) return undefined;
    const before = all();
    const known = before.find((entry) => here(entry, at));
    const entry = { ...at, messages };
    const entries = known ? before.map((each) => (here(each, at) ? entry : each)) : [entry, ...before];
    write(entries);
    goTo(place);
    const isSame = known && textOf(known.messages[0]?.content) === textOf(messages[0]?.content);
    return isSame ? undefined : picker(entries);
  }

  return {
    now: () => turn,
    // A click that asks for an answer. One that changes what was said goes on in a version of its own.
    ask: (args, isNewVersion) => {
      turn += 1;
      if (isNewVersion) {
        const versions = all().filter((entry) => entry.chat === place.chat).map((entry) => entry.version);
        if (versions.length) place.version = Math.max(...versions) + 1;
      }
      return [turn, ...args.slice(1)];
    },
    // The chat shows an edit before the page hears of the click: look a moment later, when `ask` has been called.
    keep: async (messages) => {
      const at = place;
      await new Promise((later) => setTimeout(later));
      return [keep(messages, at)];
    },
    leave: () => [left = turn],
    // By the time that nothing more comes of the answer before, another question may have been asked: it stays.
    fresh: (messages) => {
      if (left !== turn) return [];
      keep(messages);
      goTo(newPlace());
      return [[], picker(all()), "No answer yet."];
    },
    open: (key, messages) => {
      const found = all().find((entry) => keyOf(entry) === key);
      if (left !== turn || !found || here(found)) return [];
      keep(messages);
      goTo({ chat: found.chat, version: found.version });
      return [found.messages, picker(all()), "No answer yet."];
    },
    restore: () => {
      const entries = all();
      return [entries.find((entry) => here(entry))?.messages, picker(entries), keeps];
    },
    remember: (wanted, messages) => {
      if (wanted === keeps) return [];
      keeps = wanted;
      store("localStorage", `${KEY}-keeps`, JSON.stringify(keeps));
      unkept = [];
      goTo(newPlace());
      keep(messages);
      return [picker(all())];
    },
    forget: () => {
      store("localStorage", KEY, null);
      unkept = [];
      goTo(newPlace());
      return [[], picker([]), "No answer yet."];
    },
  };
})();

// Escape presses the Stop button of the tab that is shown.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const stops = [...document.querySelectorAll("button.sk-stop")];
  stops.find((button) => button.offsetParent !== null)?.click();
});
