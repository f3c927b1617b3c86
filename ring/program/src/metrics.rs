//! Figures for Prometheus, in its text format, and for `top`, which reads the same text.

use crate::control::{readable, Answering};
use nix::poll::PollTimeout;
use std::fmt::{Display, Write as _};
use std::io::{self, Read, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long a scraper may take for its request, milliseconds.
const REQUEST_MS: u16 = 2000;
/// The longest request that is read.
const REQUEST_BYTES: usize = 8192;
/// Pause after an error, before the next one is waited for.
const PAUSE: Duration = Duration::from_millis(100);

/// A text under construction.
#[derive(Debug, Default)]
pub struct Exposition(String);

impl Exposition {
    /// Begins a metric; `kind` as Prometheus has it: `counter`, `gauge` or `summary`.
    pub fn metric(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// Adds a value of the metric; `labels` are names and values.
    pub fn value(&mut self, name: &str, labels: &[(&str, &dyn Display)], value: impl Display) {
        let quoted = |text: String| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<_> = labels.iter().map(|(name, v)| format!("{name}=\"{}\"", quoted(v.to_string()))).collect();
        let _ = match labels.is_empty() {
            true => writeln!(self.0, "{name} {value}"),
            false => writeln!(self.0, "{name}{{{}}} {value}", labels.join(",")),
        };
    }

    /// Adds the metrics of another text.
    pub fn append(&mut self, other: Exposition) {
        self.0 += &other.0;
    }

    /// The text.
    pub fn text(self) -> String {
        self.0
    }
}

/// One line of such a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Names and values.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// The value of a label; empty: there is none.
    pub fn label(&self, name: &str) -> &str {
        self.labels.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value)
    }
}

/// Reads a text of [`Exposition`]; `None`: it is none.
pub fn parse(text: &str) -> Option<Vec<Sample>> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(sample).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let (name, value) = line.rsplit_once(' ')?;
    let (name, labels) = match name.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}')?),
        None => (name, ""),
    };
    let label = |pair: &str| {
        let (key, value) = pair.split_once("=\"")?;
        Some((key.to_owned(), value.strip_suffix('"')?.to_owned()))
    };
    let labels = labels.split(',').filter(|pair| !pair.is_empty()).map(label).collect::<Option<_>>()?;
    Some(Sample { name: name.into(), labels, value: value.parse().ok()? })
}

/// Listens for scrapers at `address`: a port alone is one of the loopback device.
///
/// # Errors
/// It is no address, or cannot be had.
pub fn listen(address: &str) -> io::Result<TcpListener> {
    let told = |why: String| io::Error::new(io::ErrorKind::InvalidInput, format!("metrics = {address}: {why}"));
    let port = address.parse::<u16>().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let place = port.ok().or_else(|| address.parse().ok());
    let place = place.ok_or_else(|| told("it should be a port, or an address and a port: 127.0.0.1:9464".into()))?;
    if !place.ip().is_loopback() {
        tracing::warn!("metrics = {address}: other machines may read the figures");
    }
    TcpListener::bind(place).map_err(|e| told(e.to_string()))
}

/// Answers scrapers, and clients that ask by a socket's name, on a thread of its own.
///
/// # Errors
/// The system has no thread left.
pub fn serve(
    scrapers: Option<TcpListener>,
    others: Vec<(Answering, Box<dyn Fn() -> String + Send>)>,
    text: impl Fn() -> String + Send + 'static,
) -> io::Result<()> {
    let work = move || loop {
        let mut fds: Vec<_> = others.iter().map(|(socket, _)| socket.fd()).collect();
        fds.extend(scrapers.as_ref().map(AsFd::as_fd));
        let Ok(ready) = readable(&fds, PollTimeout::NONE) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        for ((socket, text), _) in others.iter().zip(&ready).filter(|(_, ready)| **ready) {
            socket.answer(text);
        }
        if let (Some(scrapers), Some(true)) = (&scrapers, ready.get(others.len())) {
            let answered = scrapers.accept().and_then(|(stream, _)| answer(stream, &text));
            if answered.is_err() {
                std::thread::sleep(PAUSE);
            }
        }
    };
    crate::thread::spawn("metrics", work).map(drop)
}

/// Answers one scraper, by what a sandbox leaves: no socket options.
fn answer(mut stream: TcpStream, text: &dyn Fn() -> String) -> io::Result<()> {
    let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
    let until = Instant::now() + Duration::from_millis(REQUEST_MS.into());
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        let left = PollTimeout::from(u16::try_from(left.as_millis()).unwrap_or(REQUEST_MS));
        if request.len() > REQUEST_BYTES || !readable(&[stream.as_fd()], left)?[0] {
            return Ok(());
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => request.extend_from_slice(&buffer[..n]),
        }
    }
    let (status, body) = match request.starts_with(b"GET /metrics ") {
        true => ("200 OK", text()),
        false => ("404 Not Found", "the figures are at /metrics\n".into()),
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut text = Exposition::default();
        text.metric("x_total", "counter", "How many.");
        text.value("x_total", &[("queue", &3), ("operation", &"READ")], 17);
        text.value("up", &[], 1.5);
        let text = text.text();
        assert!(text.starts_with("# HELP x_total How many.\n# TYPE x_total counter\nx_total{queue=\"3\""), "{text}");
        let samples = parse(&text).unwrap();
        assert_eq!((samples[0].label("operation"), samples[0].value, samples[1].value), ("READ", 17.0, 1.5));
        assert!(parse("nonsense").is_none());
    }

    #[test]
    fn a_scraper_gets_the_text_and_others_a_404() {
        assert!(listen("nowhere").unwrap_err().to_string().contains("127.0.0.1:9464"));
        let listener = listen("0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(address.ip().is_loopback());
        serve(Some(listener), Vec::new(), || "up 1\n".into()).unwrap();
        for (path, expected) in [("/metrics", "up 1\n"), ("/", "at /metrics")] {
            let mut stream = TcpStream::connect(address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 ") && answer.contains(expected), "{answer}");
        }
    }
}
