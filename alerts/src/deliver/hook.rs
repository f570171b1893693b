//! HTTP hooks: a POST with JSON. 2xx means taken; redirections are not followed (a POST would become a GET on the way).

use std::time::Duration;

use serde_json::json;
use ureq::Agent;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::{chain, pem, secret};
use crate::alarm::{Alarm, Sink, Trouble};
use crate::settings::Hook as Settings;

/// A webhook: everything about the alarm.
pub struct Webhook<'a> {
    /// Where.
    pub url: &'a str,
    /// Certificates and token.
    pub settings: &'a Settings,
    /// For all of it.
    pub timeout: Duration,
}

impl Sink for Webhook<'_> {
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble> {
        let Alarm { severity, subject, text, machine, node, key, short: _ } = alarm;
        let body = json!({
            "severity": severity, "subject": subject, "text": text, "machine": machine, "node": node, "key": key,
            "from": crate::node_name(),
        });
        post(self.url, &body, self.settings, self.timeout)
    }
}

/// A gateway to telephones.
pub struct Gateway<'a> {
    /// Where.
    pub url: &'a str,
    /// The number.
    pub to: &'a str,
    /// Certificates and token.
    pub settings: &'a Settings,
    /// For all of it.
    pub timeout: Duration,
}

impl Sink for Gateway<'_> {
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble> {
        post(self.url, &json!({ "to": self.to, "text": alarm.in_short() }), self.settings, self.timeout)
    }
}

fn post(url: &str, body: &serde_json::Value, settings: &Settings, timeout: Duration) -> Result<(), Trouble> {
    let agent: Agent = Agent::config_builder()
        .timeout_global(Some(timeout))
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .tls_config(TlsConfig::builder().root_certs(roots(settings)?).build())
        .build()
        .new_agent();
    let mut request = agent.post(url).header("Content-Type", "application/json");
    if let Some(file) = &settings.token_file {
        request = request.header("Authorization", format!("Bearer {}", secret(file, "token for hooks")?));
    }
    let answer = request.send(body.to_string().as_bytes());
    let answer = answer.map_err(|e| Trouble::passing(format!("cannot reach the hook {url}: {}", chain(&e))))?;
    let status = answer.status();
    let said = format!("the hook {url} answered {status} in place of 200: see its own log");
    match status.as_u16() {
        200..=299 => Ok(()),
        // Too early, too many, and what the other side will mend.
        408 | 425 | 429 | 500..=599 => Err(Trouble::passing(said)),
        _ => Err(Trouble::lasting(said)),
    }
}

fn roots(settings: &Settings) -> Result<RootCerts, Trouble> {
    let Some(file) = &settings.ca_file else {
        let trusted = rustls_native_certs::load_native_certs().certs;
        let trusted: Vec<_> = trusted.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        return Ok(RootCerts::new_with_certs(&trusted));
    };
    let text = pem(file)?;
    let certificates: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(Trouble::passing(format!("{} holds no certificates in PEM form", file.display())));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}
