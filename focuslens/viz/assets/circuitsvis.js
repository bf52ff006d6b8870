// Keyboard access to circuitsvis's small maps, which by themselves only react to a pointer.
"use strict";
(() => {
  const view = document.getElementById("view");
  const prepare = () => {
    for (const name of view.querySelectorAll("h4")) {
      const tile = name.parentElement;
      if (tile.getAttribute("role") === "button" || !tile.querySelector("canvas")) continue;
      tile.setAttribute("role", "button");
      tile.setAttribute("aria-label", `Show head ${name.textContent}`);
      tile.tabIndex = 0;
      tile.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        // circuitsvis prefers the map under the pointer to the chosen one, so a mouseout event comes first.
        const leave = new MouseEvent("mouseout", { bubbles: true, relatedTarget: document.body });
        view.querySelector("[role=button]:hover")?.dispatchEvent(leave);
        tile.click();
      });
      tile.querySelector("canvas").setAttribute("aria-label", `Attention pattern of head ${name.textContent}, small`);
    }
  };
  new MutationObserver(prepare).observe(view, { childList: true, subtree: true });
  prepare();
})();
