// A page inside another tells it how high it is, so that the outer one need not scroll a part of it on its own.
"use strict";
if (parent !== window) {
  const tell = () => {
    const body = document.body;
    parent.postMessage({ focuslensHeight: Math.ceil(body.getBoundingClientRect().bottom + 16) }, "*");
  };
  new ResizeObserver(tell).observe(document.body);
  addEventListener("load", tell);
}
