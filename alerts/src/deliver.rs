//! From the queue to a recipient: one sink for each kind. All of them end within their timeouts, and what they say when they fail
//! names the server, the command or the file, and what to do.

mod command;
mod hook;
mod mail;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use crate::alarm::{Alarm, Sink, Trouble};
use crate::settings::{Delivery, Kind, Recipient};

pub use command::Command;
pub use hook::{Gateway, Webhook};
pub use mail::Mail;

/// How long one attempt may take, each step of it for a mail.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// The way to a recipient.
pub fn sink<'a>(recipient: &'a Recipient, delivery: &'a Delivery, timeout: Duration) -> Box<dyn Sink + 'a> {
    let to = recipient.to.as_str();
    match recipient.kind {
        Kind::Mail => Box::new(Mail { to, settings: &delivery.mail, timeout }),
        Kind::Webhook => Box::new(Webhook { url: to, settings: &delivery.hook, timeout }),
        Kind::Command => Box::new(Command { program: Path::new(to), arguments: &[], short: false, timeout }),
        Kind::Sms => match (&delivery.sms.command, &delivery.sms.url) {
            (Some(program), _) => {
                Box::new(Command { program, arguments: std::slice::from_ref(&recipient.to), short: true, timeout })
            }
            (None, Some(url)) => Box::new(Gateway { url, to, settings: &delivery.hook, timeout }),
            (None, None) => Box::new(NoWay(to)),
        },
    }
}

/// A telephone number without a gateway.
struct NoWay<'a>(&'a str);

impl Sink for NoWay<'_> {
    fn tell(&self, _: &Alarm) -> Result<(), Trouble> {
        Err(Trouble::lasting(format!(
            "there is no way to the telephone {}: say [sms] command or url in the policy and apply it",
            self.0
        )))
    }
}

/// A secret: the first line of a file.
fn secret(file: &Path, what: &str) -> Result<String, Trouble> {
    let mut text = String::new();
    let read = fs::File::open(file).and_then(|file| file.take(4096).read_to_string(&mut text));
    read.map_err(|e| {
        Trouble::passing(format!(
            "cannot read the {what} in {}: {e}. It must be a file that the user hacluster can read (owner hacluster, mode 0400)",
            file.display()
        ))
    })?;
    Ok(text.lines().next().unwrap_or_default().trim_end().to_owned())
}

/// A file of certificates.
fn pem(file: &Path) -> Result<Vec<u8>, Trouble> {
    fs::read(file).map_err(|e| Trouble::passing(format!("cannot read the certificates in {}: {e}", file.display())))
}

/// An error and what is behind it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
