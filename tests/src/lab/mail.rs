//! A real mail server in the lab: Debian's Exim on the host [`MAIL`], with TLS and a password, and what has arrived there.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use mail_parser::MessageParser;

use super::net::{MAIL, Plane, node};
use super::{Lab, places, wait_until};

/// Where mails are taken.
pub const DOMAIN: &str = "works.example";
/// Who may send.
const USER: &str = "understudy";
/// By which password.
const PASSWORD: &str = "study";
/// Longest wait for the server to listen.
const BOUND: Duration = Duration::from_secs(120);

/// One mail that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// The first address in `To:`.
    pub to: String,
    /// `Subject:`.
    pub subject: String,
    /// The text, lines ended by `\n`.
    pub text: String,
}

/// The server. It ends with this value, or with its host.
#[derive(Debug)]
pub struct MailServer {
    child: Child,
}

impl MailServer {
    /// Start it, and give `hosts` what they need to send through it: see [`Self::policy`].
    pub fn start(lab: &Lab, hosts: &[&str]) -> Result<Self> {
        let mut authority = rcgen::CertificateParams::new(Vec::new())?;
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority_key = rcgen::KeyPair::generate()?;
        let ca = authority.self_signed(&authority_key)?.pem();
        let issuer = rcgen::Issuer::new(authority, authority_key);
        let key = rcgen::KeyPair::generate()?;
        let certificate = rcgen::CertificateParams::new(vec![MAIL.into()])?.signed_by(&key, &issuer)?.pem();
        let put = |host: &str, name: &str, text: &str, owner: &str, mode: &str| -> Result<()> {
            let file = lab.disk_file(host, "etc-understudy")?.join(name);
            fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
            let inside = format!("/etc/understudy/{name}");
            lab.run(host, &["chown", owner, &inside])?;
            lab.run(host, &["chmod", mode, &inside]).map(drop)
        };
        for host in hosts {
            put(host, "mail-ca.pem", &ca, "root", "0444")?;
            put(host, "mail-password", &format!("{PASSWORD}\n"), "hacluster", "0400")?;
        }
        put(MAIL, "mail.pem", &certificate, "root", "0444")?;
        put(MAIL, "mail.key", &key.serialize_pem(), "Debian-exim", "0400")?;
        put(MAIL, "exim.conf", &configuration()?, "root", "0444")?;
        let arrived = directory();
        lab.run(MAIL, &["install", "-d", "-o", "Debian-exim", "-m", "0755", &arrived.to_string_lossy()])?;
        // In Debian's place for it: of any other file Exim would not take who delivers.
        lab.run(MAIL, &["ln", "-sf", "/etc/understudy/exim.conf", "/etc/exim4/exim4.conf"])?;
        let mut command = lab.command(MAIL, "exim4")?;
        let child = command.arg("-bdf").stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("starting Exim")?;
        let server = Self { child };
        let knock = format!("exec 3<>/dev/tcp/{}/587", Plane::Management.address(node(MAIL)?.host));
        wait_until("Exim to listen", BOUND, || Ok(lab.output(MAIL, &["bash", "-c", &knock])?.status.success()))?;
        Ok(server)
    }

    /// The `[mail]` of a policy whose nodes send through it.
    pub fn policy() -> String {
        format!(
            "[mail]\nserver = \"{MAIL}\"\ntls = \"starttls\"\nuser = \"{USER}\"\npassword_file = \"/etc/understudy/mail-password\"\n\
             ca_file = \"/etc/understudy/mail-ca.pem\"\nfrom = \"understudy@{DOMAIN}\"\nreply_to = \"answers@{DOMAIN}\"\n"
        )
    }

    /// All mails so far, in the order in which they arrived.
    pub fn mails(&self) -> Result<Vec<Mail>> {
        let Ok(entries) = fs::read_dir(directory().join("new")) else { return Ok(Vec::new()) };
        let mut files = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<PathBuf>>>()?;
        // A maildir's names begin with the time.
        files.sort();
        files.iter().map(|file| read(&fs::read(file).with_context(|| format!("reading {}", file.display()))?)).collect()
    }
}

impl Drop for MailServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn directory() -> PathBuf {
    PathBuf::from(places::BMC_DIR).join("mail")
}

fn read(raw: &[u8]) -> Result<Mail> {
    let mail = MessageParser::default().parse(raw).context("what arrived is no mail")?;
    let to = mail.to().and_then(|to| to.first()).and_then(|to| to.address()).unwrap_or_default().to_owned();
    let text = mail.body_text(0).unwrap_or_default().replace("\r\n", "\n");
    Ok(Mail { to, subject: mail.subject().unwrap_or_default().to_owned(), text })
}

/// It takes mails for [`DOMAIN`] from whoever has logged in, over TLS only, into one maildir.
fn configuration() -> Result<String> {
    let (address, arrived) = (Plane::Management.address(node(MAIL)?.host), directory());
    Ok(format!(
        "exim_path = /usr/sbin/exim4\nprimary_hostname = {MAIL}.{DOMAIN}\nlog_file_path = /var/log/exim4/%slog\n\
         daemon_smtp_ports = 587\nnotifier_socket =\nlocal_interfaces = {address}\ntls_advertise_hosts = *\n\
         tls_certificate = /etc/understudy/mail.pem\ntls_privatekey = /etc/understudy/mail.key\n\
         domainlist local_domains = {DOMAIN}\nacl_smtp_rcpt = rcpt\nacl_smtp_data = data\nnever_users =\nhost_lookup =\n\
         rfc1413_query_timeout = 0s\nkeep_environment =\n\
         begin acl\n\
         rcpt:\n  deny message = log in first\n    !authenticated = *\n  accept domains = +local_domains\n  deny message = no relaying\n\
         data:\n  accept\n\
         begin routers\nall:\n  driver = accept\n  transport = file\n\
         begin transports\nfile:\n  driver = appendfile\n  directory = {}\n  maildir_format\n  create_directory\n\
         \x20 user = Debian-exim\n  group = Debian-exim\n\
         begin authenticators\nplain:\n  driver = plaintext\n  public_name = PLAIN\n  server_prompts = :\n\
         \x20 server_condition = ${{if and{{{{eq{{$auth2}}{{{USER}}}}}{{eq{{$auth3}}{{{PASSWORD}}}}}}}}}\n  server_set_id = $auth2\n\
         \x20 server_advertise_condition = ${{if def:tls_in_cipher}}\n",
        arrived.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mail_is_read_as_its_reader_sees_it() {
        let raw = b"To: <night@works.example>\r\nSubject: =?utf-8?Q?l=C3=A4uft?=\r\nMIME-Version: 1.0\r\n\
            Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nweb1 =3D n1\r\nend\r\n";
        let mail = read(raw).unwrap();
        assert_eq!((mail.to.as_str(), mail.subject.as_str()), ("night@works.example", "läuft"));
        assert_eq!(mail.text, "web1 = n1\nend\n");
    }
}
