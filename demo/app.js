// Settings in the address, and what the components' own markup lacks.
window.orthus = {
  number(text, spec) {
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value) || (spec.whole && !Number.isInteger(value))) return spec.value;
    return value < (spec.low ?? -Infinity) || value > (spec.high ?? Infinity) ? spec.value : value;
  },
  parse(text, spec) {
    if (text === null) return spec.value;
    if (spec.kind === "number") return this.number(text, spec);
    if (spec.kind === "flag") return text === "1" ? true : text === "0" ? false : spec.value;
    if (spec.kind === "choice") return spec.choices.includes(text) ? text : spec.value;
    return text.slice(0, spec.most);
  },
  // The values of all settings, from the address or as they are by default.
  read(specs) {
    const given = new URLSearchParams(location.search);
    const tab = given.get("tab") ?? "";
    this.open(/^[a-z]+$/.test(tab) ? tab : "", 20);
    this.ready = true;
    const values = specs.map((spec) => this.parse(given.get(spec.name), spec));
    return values.length === 1 ? values[0] : values;
  },
  // The tab named in the address; Gradio may still be selecting its own first one.
  open(tab, tries) {
    const button = tab && document.getElementById(`${tab}-button`);
    if (!button || tries === 0 || button.getAttribute("aria-selected") === "true") {
      this.opened = true;
      return;
    }
    button.click();
    setTimeout(() => this.open(tab, tries - 1), 100);
  },
  // Only what differs from the defaults stands in the address.
  write(specs, values) {
    if (!this.ready) return;
    const given = new URLSearchParams(location.search);
    specs.forEach((spec, index) => {
      const value = values[index];
      if (value === null || value === undefined || value === spec.value) given.delete(spec.name);
      else given.set(spec.name, spec.kind === "flag" ? (value ? "1" : "0") : String(value).slice(0, spec.most));
    });
    this.show(given);
  },
  tab(name) {
    if (!this.opened) return;
    const given = new URLSearchParams(location.search);
    if (name === "chat") given.delete("tab");
    else given.set("tab", name);
    this.show(given);
  },
  show(given) {
    const text = given.toString();
    history.replaceState(history.state, "", location.pathname + (text ? "?" + text : "") + location.hash);
  },
};

(() => {
  const scroll = () => {
    const log = document.getElementById("chat-log");
    if (log) log.scrollTop = log.scrollHeight;
  };
  // A name for the one input that Gradio leaves without, and a chat that can be scrolled with the keyboard and
  // follows what is written.
  const tidy = () => {
    document.querySelector("#chat-box textarea:not([aria-label])")?.setAttribute("aria-label", "Message");
    const log = document.getElementById("chat-log");
    if (!log || log.hasAttribute("role")) return;
    log.setAttribute("role", "log");
    log.setAttribute("aria-label", "Conversation");
    log.tabIndex = 0;
    new MutationObserver(scroll).observe(log, { childList: true, subtree: true, characterData: true });
  };
  document.addEventListener("input", (event) => {
    if (event.target.matches?.(".compare input[type=range]")) event.target.closest(".compare").style.setProperty("--cut", event.target.value + "%");
  });
  // On a phone the result stands below what was clicked.
  document.addEventListener("click", (event) => {
    const result = event.target.closest?.("button.primary")?.closest("[role=tabpanel]")?.querySelector(".result");
    if (result && result.getBoundingClientRect().top > innerHeight * 0.7) result.scrollIntoView({ block: "start" });
  });
  new MutationObserver(tidy).observe(document.documentElement, { childList: true, subtree: true });
  document.addEventListener("DOMContentLoaded", tidy);
})();
