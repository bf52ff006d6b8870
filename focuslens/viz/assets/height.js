// Sends the height of an inner page to the outer page, so that the inner page needs no scroll bar.
"use strict";
if (parent !== window) {
  const tell = () => {
    const body = document.body;
    parent.postMessage({ focuslensHeight: Math.ceil(body.getBoundingClientRect().bottom + 16) }, "*");
  };
  new ResizeObserver(tell).observe(document.body);
  addEventListener("load", tell);
}
