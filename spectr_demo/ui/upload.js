// A zip file goes to the server when it is to be looked at (`changes.py`), and comes back as a ticket.
(() => {
  const spectr = window.spectr;
  if (spectr.send) return;
  const tell = (text) => {
    const place = document.querySelector('#zip-sent');
    if (place) place.textContent = text;
  };
  const post = (file, token) => new Promise((done) => {
    const request = new XMLHttpRequest();
    const where = new URL('experts/zip', document.baseURI);
    where.searchParams.set('name', file.name);
    request.open('POST', where);
    if (token) request.setRequestHeader('x-spectr-owner', encodeURIComponent(token));
    request.upload.onprogress = (event) => tell(`Sent: ${Math.round(100 * event.loaded / event.total)} %`);
    request.onerror = () => done('!the file could not be sent: try again');
    request.onload = () => {
      let told = {};
      try {
        told = JSON.parse(request.responseText);
      } catch { /* a proxy's page */ }
      done(told.ticket ?? `!${told.detail ?? `the server answered ${request.status}`}`);
    };
    request.send(file);
  });
  // values: of the form; what is from a zip file gets its ticket, or "!" and what went wrong.
  spectr.send = async (values) => {
    const [, token, kind] = values;
    const file = document.querySelector('#zip')?.files[0];
    const ticket = kind === 'zip' && file ? await post(file, token) : '';
    tell('');
    return [...values.slice(0, -1), ticket];
  };
})();
