// Shows the progress of unfinished runs, and loads the page again when the report has changed.
(() => {
  const place = document.getElementById("progress");
  const line = (text) => {
    const paragraph = document.createElement("p");
    paragraph.textContent = text;
    return paragraph;
  };
  const ask = async () => {
    try {
      const status = await (await fetch("/status", { cache: "no-store" })).json();
      if (status.version !== place.dataset.version) {
        location.reload();
        return;
      }
      place.replaceChildren(...status.progress.map(line));
    } catch {
      place.replaceChildren(line("The server has ended. This page no longer changes."));
    }
    setTimeout(ask, 2000);
  };
  setTimeout(ask, 2000);
})();
