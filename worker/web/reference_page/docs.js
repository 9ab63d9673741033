// The API reference: Swagger UI over one of two documents of this worker.
"use strict";

const isOrchestrator = new URLSearchParams(location.search).get("of") === "orchestrator";
const address = isOrchestrator ? "/openapi-orchestrator.json" : "/openapi.json";
const byId = (id) => document.getElementById(id);
// The same place as on the page, so that the key is asked for once a tab.
const key = () => sessionStorage.getItem("key") || "";

function withKey(request) {
  if (key() && new URL(request.url, location.href).origin === location.origin) {
    request.headers = { "X-Internal-API-Key": key(), ...request.headers };
  }
  return request;
}

async function show() {
  const answer = await fetch(address, { headers: key() ? { "X-Internal-API-Key": key() } : {} });
  byId("key-form").hidden = answer.status !== 401;
  if (answer.status === 401) { byId("key").focus(); return; }
  window.SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#reference",
    deepLinking: true,
    validatorUrl: null,
    tryItOutEnabled: !isOrchestrator,
    // An orchestrator is another server, which this page must not call.
    supportedSubmitMethods: isOrchestrator ? [] : ["get", "post", "delete"],
    requestInterceptor: withKey,
    defaultModelsExpandDepth: 0,
  });
}

byId(isOrchestrator ? "of-orchestrator" : "of-worker").setAttribute("aria-current", "page");
byId("raw").href = address;
// Only some workers serve the page.
fetch("/", { method: "HEAD" }).then((answer) => { byId("to-page").hidden = !answer.ok; }).catch(() => {});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value);
  show();
});
show();
