//! `understudy-crm`: check a policy, print what it becomes, put it into the cluster.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Error, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use understudy_crm::check::{self, Finding, Severity};
use understudy_crm::compile::compile;
use understudy_crm::merge::{Change, canonical, merge};
use understudy_crm::model::Configuration;
use understudy_crm::policy::Policy;
use understudy_crm::xml::Element;
use understudy_crm::{cib, crm, live, pcs, planes};

/// From a policy file to a Pacemaker configuration.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what is wrong with a policy. Exit status 1 if it cannot be used.
    Check {
        /// The policy.
        file: PathBuf,
        /// Print the findings as JSON.
        #[arg(long)]
        json: bool,
        /// Corosync's configuration, to look at its links too [default: /etc/corosync/corosync.conf, if there is one].
        #[arg(long, value_name = "FILE")]
        corosync: Option<PathBuf>,
    },
    /// Print the configuration that a policy becomes.
    Show {
        /// The policy.
        file: PathBuf,
        /// As what.
        #[arg(long, value_enum, default_value_t = Format::Crm)]
        format: Format,
    },
    /// Say what `apply` would change in the cluster. Exit status 1 if anything.
    Diff {
        /// The policy.
        file: PathBuf,
    },
    /// Put the configuration into the cluster. Touches only what it owns; safe to repeat.
    Apply {
        /// The policy.
        file: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A whole CIB (XML), for crm_verify and crm_simulate.
    Cib,
    /// crmsh, for `crm configure load update FILE`.
    Crm,
    /// pcs commands, for an empty cluster.
    Pcs,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("understudy-crm: {why:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Check { file, json, corosync } => {
            let (policy, mut findings) = check::read(&text(file)?);
            if let Some(policy) = &policy {
                findings.extend(planes::check(
                    policy,
                    planes::corosync_conf(corosync.as_deref()).map_err(Error::msg)?.as_deref(),
                ));
            }
            if *json {
                println!("{}", serde_json::to_string_pretty(&findings)?);
            } else {
                report(file, &findings);
                if policy.is_some() {
                    println!("{}: can be applied", file.display());
                }
            }
            Ok(if policy.is_some() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        Command::Show { file, format } => {
            let (policy, configuration) = configuration(file)?;
            match format {
                Format::Cib => println!("{}", cib::document(&policy, &configuration)),
                Format::Crm => print!("{}", crm::text(&configuration)),
                Format::Pcs => print!("{}", pcs::script(&configuration)),
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Diff { file } => {
            let (_, configuration) = configuration(file)?;
            let current = live::query()?;
            live::ensure_cib(&current)?;
            let (_, changes) = merge(&current, &configuration);
            changes.iter().for_each(print_change);
            Ok(if changes.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        Command::Apply { file } => {
            let (_, configuration) = configuration(file)?;
            let current = live::query()?;
            live::ensure_cib(&current)?;
            let (wanted, changes) = merge(&current, &configuration);
            if changes.is_empty() || !live::apply(&current, &wanted)? {
                println!("nothing to change");
            } else {
                changes.iter().for_each(print_change);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn text(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("reading the policy {}", file.display()))
}

fn report(file: &Path, findings: &[Finding]) {
    for finding in findings {
        eprintln!("{}: {finding}", file.display());
    }
}

/// The configuration of a policy without errors; complaints go to standard error.
fn configuration(file: &Path) -> Result<(Policy, Configuration)> {
    let (policy, findings) = check::read(&text(file)?);
    report(file, &findings);
    let errors = findings.iter().filter(|f| f.severity == Severity::Error).count();
    match policy {
        Some(policy) => {
            let configuration = compile(&policy);
            Ok((policy, configuration))
        }
        None => bail!("{} has {errors} error{}; nothing was done", file.display(), if errors == 1 { "" } else { "s" }),
    }
}

fn print_change(change: &Change) {
    match change {
        Change::Add(element) => println!("+ {} {}", element.name, element.id()),
        Change::Remove(element) => println!("- {} {}", element.name, element.id()),
        Change::Modify(before, after) => {
            println!("~ {} {}", after.name, after.id());
            let (old, new) = (details(before), details(after));
            old.iter().filter(|line| !new.contains(line)).for_each(|line| println!("    - {line}"));
            new.iter().filter(|line| !old.contains(line)).for_each(|line| println!("    + {line}"));
        }
    }
}

/// What stands in an object, one line a fact.
fn details(element: &Element) -> Vec<String> {
    if element.name == "nvpair" {
        let part = |name| element.attribute(name).unwrap_or_default();
        return vec![format!("{} = {}", part("name"), part("value"))];
    }
    let mut lines: Vec<String> = element
        .attributes
        .iter()
        .filter(|(name, _)| name != "id")
        .map(|(name, value)| format!("{} {name} = {value}", element.name))
        .collect();
    for child in &element.children {
        if child.name == "op" || child.name == "rule" {
            lines.push(canonical(child, false));
        } else {
            lines.extend(details(child));
        }
    }
    lines
}
