// Light, dark, or as the system says. A plain script in the head, so that the page is never shown in the wrong colours.

{
  const ITEM = "rejoin.theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };

  let last = null; // for a browser that keeps nothing

  function chosen() {
    try {
      last = localStorage.getItem(ITEM);
    } catch {} // storage is forbidden here
    return last in NEXT ? last : "system";
  }

  function choose(theme) {
    last = theme;
    try {
      localStorage.setItem(ITEM, theme);
    } catch {}
    apply();
  }

  function apply() {
    const theme = chosen();
    document.documentElement.dataset.theme = theme;
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      button.dataset.state = theme;
      button.title = button.ariaLabel = `Colours: ${theme}. Change to ${NEXT[theme]}`;
    }
    dispatchEvent(new Event("themechange"));
  }

  apply();
  addEventListener("storage", apply); // another tab chose
  addEventListener("DOMContentLoaded", () => {
    apply();
    for (const button of document.querySelectorAll("[data-theme-switch]"))
      button.addEventListener("click", () => choose(NEXT[chosen()]));
  });
}
